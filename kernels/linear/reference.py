"""The definition of `linears`, in plain differentiable PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """[..., H], [F_i, H] each, [F_i] or None each -> [..., F_i] each."""
    return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
