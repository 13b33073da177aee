"""`layer_norm` out of torch operations: any device, any dtype.

Shapes: x, residual, y, h and their gradients are [N, H]; weight, bias and theirs [H]; mean and rstd [N].
"""

import torch


def forward(
    x_NH: torch.Tensor,
    residual_NH: torch.Tensor | None,
    weight_H: torch.Tensor | None,
    bias_H: torch.Tensor | None,
    eps: float,
    scale: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return y in h's dtype, h (None where there is no residual), and mean and rstd in the compute dtype."""
    h_NH = x_NH
    if residual_NH is not None:
        h_NH = residual_NH + (x_NH if scale == 1.0 else x_NH * scale)
    wide = h_NH.to(torch.promote_types(h_NH.dtype, torch.float32))
    mean_N = wide.mean(-1)
    mean_N = mean_N + (wide - mean_N[:, None]).mean(-1)  # to the last bit: equal elements have no variance
    normed = wide - mean_N[:, None]
    rstd_N = torch.rsqrt(normed.pow(2).mean(-1) + eps)
    normed.mul_(rstd_N[:, None])
    if weight_H is not None:
        normed.mul_((weight_H + offset if offset else weight_H).to(wide.dtype))
    if bias_H is not None:
        normed.add_(bias_H.to(wide.dtype))
    return normed.to(h_NH.dtype), None if residual_NH is None else h_NH, mean_N, rstd_N


def backward(
    grad_y_NH: torch.Tensor,
    grad_h_NH: torch.Tensor | None,
    h_NH: torch.Tensor,
    weight_H: torch.Tensor | None,
    mean_N: torch.Tensor,
    rstd_N: torch.Tensor,
    offset: float,
    needs_grad_weight: bool,
    needs_grad_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradient of h in its dtype, and those of weight and bias in the compute dtype (None where not needed)."""
    normed = (h_NH.to(rstd_N.dtype) - mean_N[:, None]).mul_(rstd_N[:, None])
    grad = grad_y_NH.to(rstd_N.dtype)
    grad_weight_H = (grad * normed).sum(0) if needs_grad_weight else None
    grad_bias_H = grad.sum(0) if needs_grad_bias else None
    if weight_H is not None:
        grad = grad * (weight_H + offset if offset else weight_H).to(rstd_N.dtype)
    grad = grad - grad.mean(-1, keepdim=True)
    along_normed = (grad * normed).mean(-1, keepdim=True)
    grad_sum = (grad - normed.mul_(along_normed)).mul_(rstd_N[:, None])
    if grad_h_NH is not None:
        grad_sum.add_(grad_h_NH)
    return grad_sum.to(h_NH.dtype), grad_weight_H, grad_bias_H
