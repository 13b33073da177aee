"""`add_rms_norm` out of torch operations; keeps h and rstd.

Shapes: x, residual, h, y and their gradients are [N, H]; weight and grad_weight [H]; rstd [N].
"""

import torch

from automodel_accel.kernels.rms_norm import eager


def forward(
    x_NH: torch.Tensor,
    residual_NH: torch.Tensor,
    weight_H: torch.Tensor | None,
    eps: float,
    offset: float,
    order: str,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y [N, H] in `out_dtype`, h [N, H] in the dtype of the sum, and rstd [N] in the compute dtype."""
    h_NH = residual_NH + (x_NH if scale == 1.0 else x_NH * scale)
    y_NH, rstd_N = eager.forward(h_NH, weight_H, eps, offset, order, out_dtype)
    return y_NH, h_NH, rstd_N


def backward(
    grad_y_NH: torch.Tensor,
    grad_h_NH: torch.Tensor | None,
    h_NH: torch.Tensor,
    weight_H: torch.Tensor | None,
    rstd_N: torch.Tensor,
    offset: float,
    order: str,
    scale: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return grad_residual [N, H], grad_x [N, H] (None where it is the same), grad_weight [H] (None where not needed).

    `dtypes` are those of x and of the residual.
    """
    grad_NH, grad_weight_H = eager.backward(grad_y_NH, h_NH, weight_H, rstd_N, offset, order, needs_grad_weight)
    if grad_h_NH is not None:
        grad_NH += grad_h_NH
    x_dtype, residual_dtype = dtypes
    same = scale == 1.0 and x_dtype == residual_dtype
    return grad_NH.to(residual_dtype), None if same else (grad_NH * scale).to(x_dtype), grad_weight_H
