"""The definitions of `layer_norm` and `add_layer_norm`, in plain differentiable PyTorch."""

import torch
import torch.nn.functional as F


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
) -> torch.Tensor:
    """Layer normalisation in float32, rounded once; see `automodel_accel.kernels.layer_norm.layer_norm`."""
    if x.dtype is torch.float32 and not offset and weight is not None and weight.dtype is torch.float32:
        return F.layer_norm(x, x.shape[-1:], weight, None if bias is None else bias.float(), eps)
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    if weight is not None:
        weight = (weight + offset if offset else weight).to(compute_dtype)
    if bias is not None:
        bias = bias.to(compute_dtype)
    return F.layer_norm(x.to(compute_dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scale: float = 1.0,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum h, rounded as the model rounds it, and its layer normalisation: (y, h)."""
    h = residual + (x * scale if scale != 1.0 else x)
    return layer_norm(h, weight, bias, eps, offset), h
