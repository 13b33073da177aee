"""`rms_norm` out of torch operations: any device, any dtype; keeps x and rstd where autograd would keep five tensors.

Shapes: x, y, grad_output, grad_x are [N, H]; weight and grad_weight [H]; rstd [N].
"""

import torch


def forward(
    x_NH: torch.Tensor, weight_H: torch.Tensor | None, eps: float, offset: float, order: str, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [N, H] in `out_dtype`, and rstd [N] in the compute dtype."""
    compute_dtype = torch.promote_types(x_NH.dtype, torch.float32)
    x_wide = x_NH.to(compute_dtype)
    rstd_N = torch.rsqrt(x_wide.pow(2).mean(-1) + eps)
    normed = x_wide * rstd_N[:, None]
    if weight_H is None:
        return normed.to(out_dtype), rstd_N
    if order == "cast_then_mul":
        return normed.to(x_NH.dtype) * (weight_H + offset if offset else weight_H), rstd_N
    return normed.mul_(weight_H.to(compute_dtype) + offset).to(out_dtype), rstd_N


def backward(
    grad_output_NH: torch.Tensor,
    x_NH: torch.Tensor,
    weight_H: torch.Tensor | None,
    rstd_N: torch.Tensor,
    offset: float,
    order: str,
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return grad_x [N, H] in x's dtype, and grad_weight [H] in the weight's dtype (None where not needed)."""
    compute_dtype = rstd_N.dtype
    normed = x_NH.to(compute_dtype) * rstd_N[:, None]
    grad_wide = grad_output_NH.to(compute_dtype)
    grad_weight_H = None
    if needs_grad_weight and weight_H is not None:
        factor = normed.to(x_NH.dtype) if order == "cast_then_mul" else normed
        grad_weight_H = (grad_wide * factor).sum(0).to(weight_H.dtype)
    if weight_H is not None:
        grad_wide = grad_wide * (weight_H.to(compute_dtype) + offset)
    along_normed = (grad_wide * normed).mean(-1, keepdim=True)
    grad_x = (grad_wide - normed.mul_(along_normed)).mul_(rstd_N[:, None])
    return grad_x.to(x_NH.dtype), grad_weight_H
