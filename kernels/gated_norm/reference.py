"""The definition of `gated_rms_norm`, in plain differentiable PyTorch."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {"silu": F.silu, "sigmoid": torch.sigmoid}
)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    activation: str = "silu",
    gate_first: bool = False,
    order: str = "cast_then_mul",
) -> torch.Tensor:
    """Root mean square normalisation before or after a gate; see `automodel_accel.kernels.gated_norm.gated_rms_norm`."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    gate_wide = ACTIVATIONS[activation](gate.to(compute_dtype))
    x_wide = x.to(compute_dtype) * gate_wide if gate_first else x.to(compute_dtype)
    normed = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    if order == "cast_then_mul":
        normed = normed.to(x.dtype)
        scaled = normed if weight is None else weight * normed
        return scaled if gate_first else (scaled * gate_wide).to(x.dtype)
    scaled = normed if weight is None else weight.to(compute_dtype) * normed
    return (scaled if gate_first else scaled * gate_wide).to(x.dtype)
