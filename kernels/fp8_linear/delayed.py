"""Casts to 8 bits by a scale that is known before x is read: by torch operations, which define them.

    scale: of the history (history.py)        q = round(clamp(x / scale, +-max)), NaN where x is not finite        q_t = q^T, padded

The same pass finds the largest value of x, for the history, and how many finite values saturated: |x / scale| > max.
delayed_fused.py has the same function. Shapes and letters as in casts.py.
"""

from collections.abc import Sequence
from typing import Any

import torch

from automodel_accel.kernels.fp8_linear import casts
from automodel_accel.kernels.fp8_linear.casts import Cast
from automodel_accel.kernels.fp8_linear.history import History, delayed_scale


def cast(
    tensors: Sequence[torch.Tensor],
    dtype: torch.dtype,
    history: History,
    *,
    straight: bool = True,
    transposed: bool = False,
    scale: torch.Tensor | None = None,
) -> Cast:
    """The tensors [R, C_i], of any floating dtype and strides, side by side, by one scale.

    Args:
        tensors: At least one.
        dtype: An 8-bit format.
        history: Gives the scale, and takes this call's largest value; empty: current scaling.
        straight: Whether q is asked for.
        transposed: Whether q_t is.
        scale: Float32 []: that of an earlier call for the same values, which is used in place of the history's; nothing is recorded.
    """
    if scale is None and history.is_empty(tensors[0].device):
        return first(casts, tensors, dtype, history, straight, transposed)
    joined = (tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), 1)).float()
    finite = joined.isfinite()
    if scale is None:
        history.settle()
        scale = delayed_scale(history.amaxes.amax(), dtype)
        over = finite & ((joined * (1 / scale)).abs() > torch.finfo(dtype).max)
        history.record(_amax([joined]), over.sum(dtype=torch.int32)[None])
    q = casts.saturated(joined.masked_fill(~finite, float("nan")), 1 / scale, dtype)
    return Cast(q if straight else None, casts.transposed(q) if transposed else None, scale)


def first(
    module: Any, tensors: Sequence[torch.Tensor], dtype: torch.dtype, history: History, straight: bool, transposed: bool
) -> Cast:
    """Current scaling by `module` (casts or casts_fused), and the history's first entry."""
    asked = torch.ones((), device=tensors[0].device)
    of_input, of_weights = module.cast_gradients(
        tensors, dtype, False, weight_scale=asked if straight else None, x_scale=asked if transposed else None
    )
    note(tensors, history)
    scale = (of_input or of_weights).scale
    return Cast(of_input and of_input.q, of_weights and of_weights.q_t, scale)


def note(tensors: Sequence[torch.Tensor], history: History) -> None:
    """Have the history know these values, as if they had been cast and none had saturated."""
    amax = _amax(tensors)
    if not history.is_empty(amax.device):
        history.settle()
    history.record(amax, torch.zeros_like(amax))


def _amax(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Bits of the largest absolute value of all, int32 [1]; those of a NaN where there is one."""
    ends = [end.float() for x in tensors if x.numel() for end in x.aminmax()]
    largest = torch.stack(ends).abs().amax() if ends else torch.zeros((), device=tensors[0].device)
    return largest[None].view(torch.int32)
