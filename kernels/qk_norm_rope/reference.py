"""The definition of `qk_norm_rope`, in plain differentiable PyTorch."""

from typing import Any

import torch

from automodel_accel.kernels.rms_norm.reference import rms_norm
from automodel_accel.kernels.rope.reference import rotate


def normalise_and_rotate(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    order: str = "cast_then_mul",
    **options: Any,
) -> torch.Tensor:
    """The norm of each head of one tensor, rotated; see `automodel_accel.kernels.qk_norm_rope.qk_norm_rope`."""
    return rotate(rms_norm(x, weight, eps, offset, order), cos, sin, **options)
