"""The definition of `gated_linear`, in plain differentiable PyTorch."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
)
LAYOUTS = ("gate_up", "up_gate")


def gated_linear(
    gate: torch.Tensor, up: torch.Tensor | None = None, activation: str = "silu", layout: str = "gate_up"
) -> torch.Tensor:
    """A gated activation, rounded where models round; see `automodel_accel.kernels.gated_linear.gated_linear`."""
    if up is None:
        gate, up = split(gate, layout)
    return ACTIVATIONS[activation](gate) * up


def split(packed: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., 2 F] -> views of gate and up, [..., F] each."""
    first, second = packed.chunk(2, dim=-1)
    return (first, second) if layout == "gate_up" else (second, first)
