"""The definition of `gated_linear`, in plain differentiable PyTorch."""

import torch

from automodel_accel.kernels.activation.reference import ACTIVATIONS

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
