"""Launches of the casts to 8 bits that are compiled ahead of time, each for the targets that multiply in its format."""

import torch

from automodel_accel.kernels.fp8_linear import casts_fused
from automodel_accel.kernels.fp8_linear.scaling import formats_of
from tests.ops.aot_cases import AotCase

ROWS = 256
FORMATS = {formats_of("sm_90"): ("sm_90", "sm_100"), formats_of("gfx942"): ("gfx942",)}
SIZES = (4096, 14336)


def _fp8(values: torch.dtype, hidden: int, dtype: torch.dtype, targets: tuple[str, ...]) -> list[AotCase]:
    x, amax_R, scale_F = torch.ones(ROWS, hidden, dtype=dtype), torch.ones(ROWS), torch.ones(hidden, 1)
    q, scale_N = torch.ones(ROWS, hidden).to(values), torch.ones(ROWS, 1)
    name = f"{dtype}/{values}/{hidden}"
    calls = {
        "one scale": lambda: casts_fused.cast_rows([x], values, False, transposed=True),
        "rows": lambda: casts_fused.cast_rows([x], values, True),
        "known rows": lambda: casts_fused.cast_rows([x], values, True, transposed=True, amax_R=amax_R),
        "gradients": lambda: casts_fused.cast_gradients([x], values, True, weight_scale=scale_F, x_scale=scale_N),
        "gradients of the input": lambda: casts_fused.cast_gradients(
            [x], values, True, weight_scale=scale_F, x_scale=None
        ),
        "transposed": lambda: casts_fused.transposed(q),
    }
    long_rows = {"rows", "gradients of the input"} if hidden > SIZES[0] else set()  # one fills a multiprocessor
    return [
        AotCase(f"fp8_linear/{call}/{name}", run, 1 if call in long_rows else 2, targets=targets)
        for call, run in calls.items()
    ]


FP8 = [
    *(
        case
        for formats, targets in FORMATS.items()
        for hidden in SIZES
        for case in _fp8(formats.e4m3, hidden, torch.bfloat16, targets)
    ),
    *(case for formats, targets in FORMATS.items() for case in _fp8(formats.e5m2, 4096, torch.float32, targets)),
]
