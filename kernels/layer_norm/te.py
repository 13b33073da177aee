"""`layer_norm` by the CUDA kernels of Transformer Engine: everything in float32, rounded once. Shapes and letters as in eager.py.

It norms one tensor with a weight and a bias of its dtype: there is no residual, and the offset is 0.
"""

import torch
import transformer_engine.pytorch  # noqa: F401  # loads the library that the extension needs
from transformer_engine.pytorch.constants import TE_DType
from transformer_engine_torch import layernorm_bwd, layernorm_fwd

SPARED = 0  # multiprocessors left to communication


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
    inputs = x_NH.contiguous(), weight_H.contiguous(), bias_H.contiguous(), eps, None, None, TE_DType[x_NH.dtype]
    with torch.cuda.device(x_NH.get_device()):  # it allocates on the current device
        y_NH, mean_N, rstd_N = layernorm_fwd(*inputs, SPARED, False)
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
    """Return the gradient of h in its dtype, and those of weight and bias in theirs (None where not needed)."""
    if h_NH.numel() == 0:
        return torch.empty_like(h_NH), torch.zeros_like(weight_H), torch.zeros_like(weight_H)
    inputs = grad_y_NH.contiguous(), h_NH.contiguous(), mean_N, rstd_N, weight_H.contiguous()
    with torch.cuda.device(h_NH.get_device()):
        grad_sum_NH, grad_weight_H, grad_bias_H = layernorm_bwd(*inputs, SPARED, False)
    return grad_sum_NH, grad_weight_H if needs_grad_weight else None, grad_bias_H if needs_grad_bias else None
