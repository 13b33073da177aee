"""Casts by the CUDA kernels of Transformer Engine, one scale a tensor: its quantiser with scales that are powers of two.

What its own linear does around cuBLAS, around the same products as the other implementations: so parameters stay where they are,
and the definition is the same. Contract as in casts.py. Read in 2.20.2. A largest value that is infinite does not become its scale
here: such values saturate.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformer_engine.pytorch  # noqa: F401  # loads the library that the extension needs
from transformer_engine.pytorch.constants import TE_DType
from transformer_engine.pytorch.tensor import Float8CurrentScalingQuantizer

from automodel_accel.kernels.fp8_linear.casts import ROWS, Cast, transposed
from automodel_accel.kernels.fp8_linear.casts import cast_rows as cast_by_torch
from automodel_accel.kernels.launch import cdiv

__all__ = ["cast_gradients", "cast_rows", "transposed"]


def cast_rows(
    tensors: Sequence[torch.Tensor],
    dtype: torch.dtype,
    rowwise: bool,
    *,
    straight: bool = True,
    transposed: bool = False,
    amax_R: torch.Tensor | None = None,
) -> Cast:
    """As in casts.py, and by it where the largest values are given: the quantiser takes none."""
    if amax_R is not None:
        return cast_by_torch(tensors, dtype, rowwise, straight=straight, transposed=transposed, amax_R=amax_R)
    joined = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    return _cast(joined, dtype, rowwise, straight, transposed)


def cast_gradients(
    gradients: Sequence[torch.Tensor],
    dtype: torch.dtype,
    rowwise: bool,
    *,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
) -> tuple[Cast | None, Cast | None]:
    """As in casts.py."""
    joined = gradients[0] if len(gradients) == 1 else torch.cat(list(gradients), 1)
    cast = _cast(joined, dtype, rowwise, weight_scale is not None, x_scale is not None)
    of_input = None if weight_scale is None else Cast(cast.q, None, cast.scale)
    return of_input, None if x_scale is None else Cast(None, cast.q_t, cast.scale)


def _cast(x_RC: torch.Tensor, dtype: torch.dtype, rowwise: bool, straight: bool, turned: bool) -> Cast:
    assert not rowwise, "refused before: it has no scale for each row"
    rows = len(x_RC)
    missing = cdiv(rows, ROWS) * ROWS - rows if turned else 0
    x_RC = torch.nn.functional.pad(x_RC, (0, 0, 0, missing)) if missing else x_RC.contiguous()
    with torch.cuda.device(x_RC.get_device()):  # it allocates on the current device
        made: Any = _quantiser(dtype, x_RC.device, turned)(x_RC)
    q: torch.Tensor = made._data.view(dtype)
    q_t = (transposed(q) if made._transpose is None else made._transpose.view(dtype)) if turned else None
    return Cast(q[:rows] if straight else None, q_t, made._scale_inv.reshape(()))


def _quantiser(dtype: torch.dtype, device: torch.device, turned: bool) -> Any:
    return Float8CurrentScalingQuantizer(
        TE_DType[dtype], device, rowwise=True, columnwise=turned, force_pow_2_scales=True
    )
