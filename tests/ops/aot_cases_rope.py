"""Launches of `rope` that are compiled ahead of time: the heads of Llama, of an MLA, of a partial rotary, every layout."""

import torch

from automodel_accel.kernels.rope import fused as rope
from tests.ops.aot_cases import DTYPES, AotCase

TOKENS = 8


def _rope(
    dtype: torch.dtype,
    layout: str = "half",
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    rotary_dim: int = 128,
    per_pair: bool = False,
    single_values: int = 0,
) -> list[AotCase]:
    both = torch.ones(1, TOKENS, sum(heads), head_dim, dtype=dtype)
    inputs = both.split(heads, 2)
    outputs = [torch.empty_like(x) for x in inputs]
    table = torch.ones(1, TOKENS, rotary_dim // (2 if per_pair else 1), dtype=dtype)
    name = f"{dtype}/{heads} x {head_dim}/{layout}/{rotary_dim}" + ("/per pair" if per_pair else "")
    fit = (3, False, single_values)
    return [
        AotCase(
            f"rope/{direction}/{name}",
            lambda run=run: run(inputs, outputs, table, table, layout, per_pair, False),
            *fit,
        )
        for direction, run in (("forward", rope.forward), ("backward", rope.backward))
    ]


# a row of cos, and the one key of an MLA, have fewer than 8 elements for each of 128 threads; so has a rest of 192 on gfx942
ROPE = [
    *(case for dtype in DTYPES for case in _rope(dtype)),
    *_rope(torch.bfloat16, "interleaved", single_values=2),
    *_rope(torch.bfloat16, "deinterleaved"),
    *_rope(torch.bfloat16, "interleaved", per_pair=True),
    *_rope(torch.bfloat16, "deinterleaved", (128, 1), 64, 64, per_pair=True, single_values=5),
    *_rope(torch.bfloat16, head_dim=256, rotary_dim=64, single_values=8),
    *_rope(torch.bfloat16, head_dim=80, rotary_dim=80),
    *_rope(torch.float32, heads=(8, 4), head_dim=256, rotary_dim=256),
]
