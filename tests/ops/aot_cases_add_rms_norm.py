"""Calls of add_rms_norm to compile ahead of time."""

import torch

from automodel_accel.kernels.rms_norm import add_fused
from tests.ops.aot_cases import ROW_SIZES, ROWS, SUM_NARROW, AotCase, with_note, with_room


def _add_rms_norm(dtype: torch.dtype, hidden: int, order: str = "cast_then_mul", scale: float = 1.0) -> list[AotCase]:
    x, weight, rstd = torch.ones(ROWS, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype), torch.ones(ROWS)
    name = f"{dtype}/{hidden}/{order}/scale {scale}"
    fit = (2 if hidden <= 4096 else 1, hidden > 8192)
    forward = (1e-6, 0.0, order, scale, dtype)
    backward = (rstd, 0.0, order, scale, (dtype, dtype), True)
    return [
        AotCase(f"add_rms_norm/forward/{name}", lambda: add_fused.forward(x, x, weight, *forward), *fit),
        AotCase(
            f"add_rms_norm/backward/{name}", lambda: add_fused.backward(x, x, x, weight, *backward), *fit, SUM_NARROW
        ),
    ]


ADD_RMS_NORM = [
    *(case for dtype, hidden in ROW_SIZES for case in _add_rms_norm(dtype, hidden)),
    *_add_rms_norm(torch.bfloat16, 4096, "mul_then_cast", 0.22),
    *_add_rms_norm(torch.bfloat16, 16384),
    with_room(_add_rms_norm(torch.bfloat16, 4096)[0]),
    *(case for hidden in (4096, 8192) for case in with_note(_add_rms_norm(torch.bfloat16, hidden)[0])),
]
