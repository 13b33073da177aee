"""Launches of the casts by delayed scales that are compiled ahead of time, each for the targets that multiply in its format."""

import torch

from automodel_accel.kernels.fp8_linear import delayed_fused
from automodel_accel.kernels.fp8_linear.history import History
from tests.ops.aot_cases import AotCase
from tests.ops.aot_cases_fp8 import FORMATS, ROWS, SIZES


def _delayed(values: torch.dtype, hidden: int, dtype: torch.dtype, targets: tuple[str, ...]) -> list[AotCase]:
    """One tensor by the scale of the history, and again by that very scale."""
    x, history, scale = torch.ones(ROWS, hidden, dtype=dtype), History(), torch.ones(())
    history.record(*torch.zeros(2, 256, dtype=torch.int32))
    name = f"{dtype}/{values}/{hidden}"
    calls = {
        "both": lambda: delayed_fused.cast([x], values, history, transposed=True),
        "straight": lambda: delayed_fused.cast([x], values, history),
        "again": lambda: delayed_fused.cast([x], values, history, straight=False, transposed=True, scale=scale),
    }
    return [AotCase(f"fp8_delayed/{call}/{name}", run, 2, targets=targets) for call, run in calls.items()]


FP8_DELAYED = [
    *(
        case
        for formats, targets in FORMATS.items()
        for hidden in SIZES
        for case in _delayed(formats.e4m3, hidden, torch.bfloat16, targets)
    ),
    *(case for formats, targets in FORMATS.items() for case in _delayed(formats.e5m2, 4096, torch.float32, targets)),
]
