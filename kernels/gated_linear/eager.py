"""`gated_linear` out of torch operations: any device, any dtype; no temporary tensor.

Shapes: all tensors are [N, F] with unit stride inside a row; rows may be strided.
"""

import torch

from automodel_accel.kernels.activation.eager import activate, differentiate


def forward(gate_NF: torch.Tensor, up_NF: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(gate) * up, [N, F]."""
    y_NF = torch.empty(gate_NF.shape, dtype=gate_NF.dtype, device=gate_NF.device)
    return activate(gate_NF, activation, y_NF).mul_(up_NF)


def backward(
    grad_output_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    activation: str,
    grad_gate_NF: torch.Tensor,
    grad_up_NF: torch.Tensor,
) -> None:
    """Write the gradients of gate and up into the last two arguments."""
    activate(gate_NF, activation, grad_up_NF).mul_(grad_output_NF)
    grad_activated_NF = torch.mul(grad_output_NF, up_NF, out=grad_gate_NF)
    differentiate(grad_activated_NF, gate_NF, activation, grad_gate_NF)
