"""`rms_norm` by Liger's Triton kernels, through its plain functions: the gradient gets memory of its own.

Its autograd function, which is not used, writes the gradient of x over the incoming one. Shapes and letters as in eager.py.
"""

import torch
from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward
from liger_kernel.ops.utils import calculate_settings

CASTING = {"cast_then_mul": "llama", "mul_then_cast": "gemma"}
CASTING_NUMBERS = {"cast_then_mul": 0, "mul_then_cast": 1}  # as its backward names them
ROW_MODE = True  # a program walks rows; the mode for many short rows counts elements in 32 bits


def forward(
    x_NH: torch.Tensor, weight_H: torch.Tensor | None, eps: float, offset: float, order: str, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [N, H] in x's dtype, and rstd [N] in float32."""
    if x_NH.numel() == 0:
        return torch.empty_like(x_NH), x_NH.new_empty(x_NH.shape[0], dtype=torch.float32)
    weight_H = None if weight_H is None else weight_H.contiguous()
    y_NH, _, rstd_N, *_ = rms_norm_forward(x_NH.contiguous(), weight_H, eps, offset, CASTING[order], ROW_MODE)
    return y_NH, rstd_N


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
    if x_NH.numel() == 0:
        return torch.empty_like(x_NH), None if weight_H is None else torch.zeros_like(weight_H)
    block, warps = calculate_settings(x_NH.shape[1])
    grad_x_NH, grad_weight_H = rms_norm_backward(
        grad_output_NH.contiguous(),
        x_NH.contiguous(),
        None if weight_H is None else weight_H.contiguous(),
        rstd_N,
        offset,
        CASTING_NUMBERS[order],
        block,
        warps,
        in_place=False,
        row_mode=ROW_MODE,
        needs_dw=needs_grad_weight,
    )
    return grad_x_NH, grad_weight_H
