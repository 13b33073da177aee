"""Casts to 8 bits by torch operations: the definition of every cast, and what runs where Triton does not.

N rows (tokens), H columns; F rows of a weight, or columns of a gradient. A cast of several tensors is one tensor: weights of
one input stand one below the other, gradients of their outputs side by side. casts_fused.py has the same functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from automodel_accel.kernels.fp8_linear.scaling import scale_of
from automodel_accel.kernels.launch import cdiv

ROWS = 16  # the rows of a transposed cast are padded with zeros to a multiple of it: what a product of 8-bit values sums over


@dataclass(frozen=True, slots=True)
class Cast:
    """A tensor in 8 bits.

    Attributes:
        q: [R, C], or None where nobody asked for it.
        q_t: [C, R padded to a multiple of 16], zeros in what is padded; or None.
        scale: Float32: [] where one scale serves all, else [R, 1] of the rows of q. value = q * scale.
    """

    q: torch.Tensor | None
    q_t: torch.Tensor | None
    scale: torch.Tensor


def cast_rows(
    tensors: Sequence[torch.Tensor],
    dtype: torch.dtype,
    rowwise: bool,
    *,
    straight: bool = True,
    transposed: bool = False,
    amax_R: torch.Tensor | None = None,
) -> Cast:
    """The tensors [R_i, C], of any floating dtype and strides, one below the other: R = sum(R_i).

    Args:
        tensors: At least one.
        dtype: An 8-bit format.
        rowwise: A scale for each row, else one for all.
        straight: Whether q is asked for.
        transposed: Whether q_t is.
        amax_R: Float32 [R]: the largest absolute value of each row, where somebody knows it already.
    """
    if amax_R is None:
        amax_R = torch.cat([_amax(x, 1) for x in tensors])
    amax = amax_R if rowwise else _largest(amax_R)
    scale = scale_of(amax, dtype)
    scale = scale[:, None] if rowwise else scale
    joined = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    q = saturated(joined, 1 / scale, dtype)
    return Cast(q if straight else None, _transposed(q) if transposed else None, scale)


def cast_gradients(
    gradients: Sequence[torch.Tensor],
    dtype: torch.dtype,
    rowwise: bool,
    *,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
) -> tuple[Cast | None, Cast | None]:
    """Gradients [N, F_i] of the outputs of linears of one input, side by side: F = sum(F_i).

    Two products take them. The input's gradient sums over F: with a scale for each row, the scale of each row of the weights [F, 1]
    is a factor of the column before the cast. The weights' gradients sum over N: with a scale for each column (a row of q_t), the
    scale of each row of x [N, 1] is a factor of the row. Both are powers of two, so that nothing more is rounded.

    Args:
        gradients: At least one, of any floating dtype and strides.
        dtype: An 8-bit format.
        rowwise: As above; else one scale for all, the same in both.
        weight_scale: That of the weights' cast; None where no gradient of the input is asked for.
        x_scale: That of the input's cast; None where no gradient of a weight is asked for.

    Returns:
        For the input's gradient a cast with q [N, F] and the scale of its rows, or None; for the weights' gradients a cast with
        q_t [F, N padded] and the scale of the rows of q_t, or None.
    """
    joined = (gradients[0] if len(gradients) == 1 else torch.cat(list(gradients), 1)).float()
    if not rowwise:
        scale = scale_of(_largest(_amax(joined, 1)), dtype)
        q = saturated(joined, 1 / scale, dtype)
        return (
            None if weight_scale is None else Cast(q, None, scale),
            None if x_scale is None else Cast(None, _transposed(q), scale),
        )
    of_input = of_weights = None
    if weight_scale is not None:
        of_input = cast_rows([joined * weight_scale.t()], dtype, True)
    if x_scale is not None:
        turned = cast_rows([(joined * x_scale).t()], dtype, True)
        assert turned.q is not None
        of_weights = Cast(None, _padded(turned.q), turned.scale)
    return of_input, of_weights


def transposed(q_RC: torch.Tensor) -> torch.Tensor:
    """The transpose of 8-bit values, [C, R padded to a multiple of 16]."""
    return _transposed(q_RC)


def saturated(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x * factor, rounded once, saturated; NaN stays."""
    most = torch.finfo(dtype).max
    return (x.float() * factor).clamp(-most, most).to(dtype)


def _amax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Float32; NaN where there is one; 0 of nothing."""
    wide = x.abs().float()
    return wide.amax(dim) if x.shape[dim] else wide.sum(dim)


def _largest(amax_R: torch.Tensor) -> torch.Tensor:
    return amax_R.amax() if amax_R.numel() else amax_R.new_zeros(())


def _transposed(q: torch.Tensor) -> torch.Tensor:
    return _padded(_bytes(q).t().contiguous().view(q.dtype))


def _padded(q: torch.Tensor) -> torch.Tensor:
    """Rows padded with zeros to a multiple of 16 elements."""
    missing = cdiv(q.shape[1], ROWS) * ROWS - q.shape[1]
    return torch.nn.functional.pad(_bytes(q), (0, missing)).view(q.dtype) if missing else q.contiguous()


def _bytes(q: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes, which every operation of torch takes."""
    return q.view(torch.uint8)
