"""Launches of `experts` that are compiled ahead of time: the sizes of a mixture of 30 billion parameters, and its variants."""

import torch

from automodel_accel.kernels.experts import fused as experts
from tests.ops.aot_cases import DTYPES, AotCase

TOKENS, TOP_K, EXPERTS = 8, 4, 4
HIDDEN, INNER = 2048, 768
NUMBERS_OF_A_SLOT = 5  # accesses to one value of a slot, such as its weight, in an unrolled loop


def _experts(
    dtype: torch.dtype, activation: str = "silu", layout: str = "gate_up", bias: bool = False
) -> list[AotCase]:
    rows = TOKENS * TOP_K
    y, inner = (
        torch.ones(rows, HIDDEN, dtype=dtype),
        torch.ones(rows, INNER * (2 if layout == "gate_up" else 1), dtype=dtype),
    )
    weights, order = torch.ones(TOKENS, TOP_K, dtype=dtype), torch.arange(rows)
    bias_ED = torch.ones(EXPERTS, HIDDEN, dtype=dtype) if bias else None
    grad, offsets = torch.ones(rows, INNER, dtype=dtype), torch.arange(8, rows + 1, 8, dtype=torch.int32)
    name = f"{dtype}/{HIDDEN}, {INNER}/{activation}, {layout}" + ("/biases" if bias else "")
    fit = (4, False, NUMBERS_OF_A_SLOT)
    return [
        AotCase(
            f"experts/combine/{name}", lambda: experts.combine(y, weights, bias_ED, order, order, TOKENS, dtype), *fit
        ),
        AotCase(
            f"experts/differentiate/{name}",
            lambda: experts.differentiate(grad, inner, weights, order, activation, layout),
            *fit,
        ),
        AotCase(f"experts/sum_rows/{name}", lambda: experts.sum_rows(y, offsets), 4, False, 1),
    ]


EXPERTS_CASES = [
    *(case for dtype in DTYPES for case in _experts(dtype)),
    *_experts(torch.bfloat16, "gelu_tanh", bias=True),
    *_experts(torch.bfloat16, "relu2", "plain"),
    *_experts(torch.bfloat16, "silu", "none", bias=True),
]
