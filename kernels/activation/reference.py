"""The definition of `activation`, in plain differentiable PyTorch."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F


def relu2(x: torch.Tensor) -> torch.Tensor:
    """The square of relu."""
    return F.relu(x).square()


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Gelu by a sigmoid."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "relu2": relu2,
        "quick_gelu": quick_gelu,
    }
)


def activation(x: torch.Tensor, name: str) -> torch.Tensor:
    """One activation; see `automodel_accel.kernels.activation.activation`."""
    return ACTIVATIONS[name](x)
