"""Launches of gated_rms_norm that are compiled ahead of time; see aot_cases.py."""

import torch

from automodel_accel.kernels.gated_norm import fused
from tests.ops.aot_cases import ROW_SIZES, ROWS, SUM_NARROW, AotCase


def _gated_norm(dtype: torch.dtype, hidden: int, gate_first: bool, order: str = "cast_then_mul") -> list[AotCase]:
    x, weight, rstd = torch.ones(ROWS, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype), torch.ones(ROWS)
    name = f"{dtype}/{hidden}/{order}/gate {'first' if gate_first else 'last'}"
    options = ("silu", gate_first, order)
    forward = (2 if hidden <= 4096 else 1, hidden > 8192)
    backward = (2 if hidden <= 2048 else 1, hidden > 8192, SUM_NARROW)
    return [
        AotCase(
            f"gated_norm/forward/{name}", lambda: fused.forward(x, x.clone(), weight, 1e-6, *options, dtype), *forward
        ),
        AotCase(
            f"gated_norm/backward/{name}",
            lambda: fused.backward(x, x.clone(), x.clone(), weight, rstd, *options, True),
            *backward,
        ),
    ]


GATED_NORM = [
    *(
        case
        for dtype, hidden in ROW_SIZES
        for gate_first in (False, True)
        for case in _gated_norm(dtype, hidden, gate_first)
    ),
    *_gated_norm(torch.bfloat16, 4096, False, "mul_then_cast"),
]
