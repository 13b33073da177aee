"""The definitions of `rms_norm` and `add_rms_norm`, in plain differentiable PyTorch."""

import torch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    order: str = "cast_then_mul",
) -> torch.Tensor:
    """Root mean square normalisation, rounded where the model rounds; see `automodel_accel.kernels.rms_norm.rms_norm`."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(compute_dtype)
    normed = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if order == "cast_then_mul":
        return (weight + offset if offset else weight) * normed.to(x.dtype)
    return (normed * (weight.to(compute_dtype) + offset)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    order: str = "cast_then_mul",
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h): the residual sum h, rounded where the model rounds, and its norm."""
    h = residual + (x if scale == 1.0 else x * scale)
    return rms_norm(h, weight, eps, offset, order), h
