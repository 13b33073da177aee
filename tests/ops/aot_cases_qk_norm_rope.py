"""Launches of `qk_norm_rope` that are compiled ahead of time: the heads of Qwen3, Gemma 3, and of a partial rotary."""

import torch

from automodel_accel.kernels.qk_norm_rope import fused as qk_norm_rope
from tests.ops.aot_cases import DTYPES, SUM_NARROW, AotCase

TOKENS = 8


def _qk_norm_rope(
    dtype: torch.dtype,
    layout: str = "half",
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    rotary_dim: int = 128,
    single_values: int = 0,
    programs: int = 3,
) -> list[AotCase]:
    inputs = [torch.ones(1, TOKENS, n, head_dim, dtype=dtype) for n in heads]
    outputs = [torch.empty_like(x) for x in inputs]
    weights = [torch.ones(head_dim, dtype=dtype) for _ in heads]
    rstds = [torch.ones(1, TOKENS, n) for n in heads]
    table = torch.ones(1, TOKENS, rotary_dim, dtype=dtype)
    name = f"{dtype}/{heads} x {head_dim}/{layout}/{rotary_dim}"
    form = (layout, False, False)
    fit = (programs, False, single_values)

    def forward() -> None:
        qk_norm_rope.forward(inputs, outputs, weights, rstds, table, table, 1e-6, 0.0, *form)

    def backward() -> None:
        qk_norm_rope.backward(inputs, inputs, weights, rstds, outputs, table, table, 0.0, *form)

    return [
        AotCase(f"qk_norm_rope/forward/{name}", forward, *fit),
        AotCase(f"qk_norm_rope/backward/{name}", backward, *fit),
    ]


# a row of cos or of a weight has fewer than 8 elements for each of 128 threads; so has a rest of 64
QK_NORM_ROPE = [
    *(case for dtype in DTYPES for case in _qk_norm_rope(dtype, single_values=SUM_NARROW)),
    *_qk_norm_rope(torch.bfloat16, "interleaved", single_values=6),
    *_qk_norm_rope(torch.bfloat16, heads=(8, 4), head_dim=256, rotary_dim=256, single_values=12),
    *_qk_norm_rope(torch.bfloat16, heads=(96, 8), rotary_dim=64, single_values=12, programs=2),
]
