"""Launches of layer_norm and add_layer_norm that are compiled ahead of time; see aot_cases.py."""

import torch

from automodel_accel.kernels.layer_norm import fused
from tests.ops.aot_cases import ROW_SIZES, ROWS, SUM_NARROW, AotCase


def _layer_norm(dtype: torch.dtype, hidden: int, add: bool = False) -> list[AotCase]:
    x, vector, statistic = torch.ones(ROWS, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype), torch.ones(ROWS)
    more = x if add else None
    name = f"{dtype}/{hidden}/{'add' if add else 'alone'}"
    forward, backward = (
        (2 if hidden <= 4096 else 1, hidden > 8192),
        (2 if hidden <= 2048 else 1, hidden > 8192, SUM_NARROW),
    )
    return [
        AotCase(f"layer_norm/forward/{name}", lambda: fused.forward(x, more, vector, vector, 1e-6, 0.5, 0.0), *forward),
        AotCase(
            f"layer_norm/backward/{name}",
            lambda: fused.backward(x, more, x, vector, statistic, statistic, 0.0, True, True),
            *backward,
        ),
    ]


LAYER_NORM = [
    *(case for dtype, hidden in ROW_SIZES for add in (False, True) for case in _layer_norm(dtype, hidden, add)),
    *_layer_norm(torch.bfloat16, 16384),
]
