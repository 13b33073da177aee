"""The definition of `experts`, in plain differentiable PyTorch."""

from collections.abc import Callable

import torch

from automodel_accel.kernels.activation.reference import ACTIVATIONS
from automodel_accel.kernels.gated_linear.reference import LAYOUTS, gated_linear


def experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    layout: str = "gate_up",
    is_transposed: bool = False,
    gate: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Each token through its experts, one copy of their weights a token; see `automodel_accel.kernels.experts.experts`."""
    rows = hidden_states.to(up.dtype).unsqueeze(1).expand(-1, top_k_index.shape[1], -1)
    inner = _linear(rows, top_k_index, up, up_bias, is_transposed)
    activated = gate(inner) if gate is not None else activate(inner, activation, layout)
    y_TKD = _linear(activated, top_k_index, down, down_bias, is_transposed)
    return (y_TKD * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def activate(inner: torch.Tensor, activation: str, layout: str) -> torch.Tensor:
    """The activation of packed gate and up, or of up alone."""
    return gated_linear(inner, None, activation, layout) if layout in LAYOUTS else ACTIVATIONS[activation](inner)


def _linear(
    x_TKI: torch.Tensor, index_TK: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool
) -> torch.Tensor:
    weight_TKIO = (weight if is_transposed else weight.transpose(1, 2))[index_TK]
    y_TKO = torch.matmul(x_TKI.unsqueeze(-2), weight_TKIO).squeeze(-2)
    return y_TKO if bias is None else y_TKO + bias[index_TK]
