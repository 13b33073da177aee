"""`layer_norm` by Liger's Triton kernels, through its plain functions. Shapes and letters as in eager.py.

It norms one tensor with a weight and a bias: there is no residual, and the offset is 0.
"""

import torch
from liger_kernel.ops.layer_norm import layer_norm_backward, layer_norm_forward


def forward(
    x_NH: torch.Tensor,
    residual_NH: None,
    weight_H: torch.Tensor,
    bias_H: torch.Tensor,
    eps: float,
    scale: float,
    offset: float,
) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor]:
    """Return y in x's dtype, no sum, and mean and rstd in float32."""
    if x_NH.numel() == 0:
        mean_N, rstd_N = x_NH.new_empty(2, x_NH.shape[0], dtype=torch.float32)
        return torch.empty_like(x_NH), None, mean_N, rstd_N
    y_NH, _, mean_N, rstd_N, *_ = layer_norm_forward(x_NH.contiguous(), weight_H.contiguous(), bias_H.contiguous(), eps)
    return y_NH, None, mean_N, rstd_N


def backward(
    grad_y_NH: torch.Tensor,
    grad_h_NH: None,
    h_NH: torch.Tensor,
    weight_H: torch.Tensor,
    mean_N: torch.Tensor,
    rstd_N: torch.Tensor,
    offset: float,
    needs_grad_weight: bool,
    needs_grad_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradient of h in its dtype, and those of weight and bias in the weight's (None where not needed)."""
    if h_NH.numel() == 0:
        return torch.empty_like(h_NH), torch.zeros_like(weight_H), torch.zeros_like(weight_H)
    weight_H = weight_H.contiguous()
    grad_sum_NH, grad_weight_H, grad_bias_H = layer_norm_backward(
        grad_y_NH.contiguous(),
        h_NH.contiguous(),
        weight_H,
        weight_H,  # the bias, of which it reads the dtype alone
        mean_N,
        rstd_N,
        needs_dw=needs_grad_weight,
        needs_db=needs_grad_bias,
    )
    return grad_sum_NH, grad_weight_H, grad_bias_H
