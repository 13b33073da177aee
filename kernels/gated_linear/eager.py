"""`gated_linear` out of torch operations: any device, any dtype; no temporary tensor.

Shapes: all tensors are [N, F] with unit stride inside a row; rows may be strided.
"""

import torch

aten = torch.ops.aten


def forward(gate_NF: torch.Tensor, up_NF: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(gate) * up, [N, F]."""
    y_NF = torch.empty(gate_NF.shape, dtype=gate_NF.dtype, device=gate_NF.device)
    return _activate(gate_NF, activation, y_NF).mul_(up_NF)


def backward(
    grad_output_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    activation: str,
    grad_gate_NF: torch.Tensor,
    grad_up_NF: torch.Tensor,
) -> None:
    """Write the gradients of gate and up into the last two arguments."""
    _activate(gate_NF, activation, grad_up_NF).mul_(grad_output_NF)
    grad_activated_NF = torch.mul(grad_output_NF, up_NF, out=grad_gate_NF)
    if activation == "silu":
        aten.silu_backward.grad_input(grad_activated_NF, gate_NF, grad_input=grad_gate_NF)
    else:
        approximate = _approximate(activation)
        aten.gelu_backward.grad_input(grad_activated_NF, gate_NF, approximate=approximate, grad_input=grad_gate_NF)


def _activate(gate_NF: torch.Tensor, activation: str, out_NF: torch.Tensor) -> torch.Tensor:
    if activation == "silu":
        return aten.silu.out(gate_NF, out=out_NF)  # type: ignore[no-any-return]
    return aten.gelu.out(gate_NF, approximate=_approximate(activation), out=out_NF)  # type: ignore[no-any-return]


def _approximate(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"
