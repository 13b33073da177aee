"""`rms_norm` by the CUDA kernels of Transformer Engine: everything in float32, rounded once. Shapes and letters as in eager.py."""

import torch
import transformer_engine.pytorch  # noqa: F401  # loads the library that the extension needs
from transformer_engine.pytorch.constants import TE_DType
from transformer_engine_torch import rmsnorm_bwd, rmsnorm_fwd

SPARED = 0  # multiprocessors left to communication


def forward(
    x_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, offset: float, order: str, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [N, H] in x's dtype, and rstd [N] in float32."""
    if x_NH.numel() == 0:
        return torch.empty_like(x_NH), x_NH.new_empty(x_NH.shape[0], dtype=torch.float32)
    inputs = x_NH.contiguous(), weight_H.contiguous(), eps, None, None, TE_DType[x_NH.dtype]
    with torch.cuda.device(x_NH.get_device()):  # it allocates on the current device
        y_NH, _, rstd_N = rmsnorm_fwd(*inputs, SPARED, offset == 1.0)
    return y_NH, rstd_N


def backward(
    grad_output_NH: torch.Tensor,
    x_NH: torch.Tensor,
    weight_H: torch.Tensor,
    rstd_N: torch.Tensor,
    offset: float,
    order: str,
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return grad_x [N, H] in x's dtype, and grad_weight [H] in the weight's dtype (None where not needed)."""
    if x_NH.numel() == 0:
        return torch.empty_like(x_NH), torch.zeros_like(weight_H)
    inputs = grad_output_NH.contiguous(), x_NH.contiguous(), rstd_N, weight_H.contiguous()
    with torch.cuda.device(x_NH.get_device()):
        grad_x_NH, grad_weight_H = rmsnorm_bwd(*inputs, SPARED, offset == 1.0)
    return grad_x_NH, grad_weight_H if needs_grad_weight else None
