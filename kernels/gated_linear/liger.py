"""`gated_linear` by Liger's Triton kernels, through its plain functions.

Its backward writes the gradients over gate and up, which a model may read again. Here it works on copies, which become the
gradients: 4 passes over [N, F] more than the floor. It takes contiguous tensors only. Shapes as in eager.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from liger_kernel.ops.geglu import geglu_backward, geglu_forward
from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

FORWARD: dict[str, Callable[..., Any]] = {"silu": swiglu_forward, "gelu_tanh": geglu_forward}
BACKWARD: dict[str, Callable[..., Any]] = {"silu": swiglu_backward, "gelu_tanh": geglu_backward}


def forward(gate_NF: torch.Tensor, up_NF: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(gate) * up, [N, F]."""
    if gate_NF.numel() == 0:
        return gate_NF.new_empty(gate_NF.shape)
    _, _, y_NF = FORWARD[activation](gate_NF.contiguous(), up_NF.contiguous())
    return y_NF  # type: ignore[no-any-return]


def backward(
    grad_output_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    activation: str,
    grad_gate_NF: torch.Tensor,
    grad_up_NF: torch.Tensor,
) -> None:
    """Write the gradients of gate and up into the last two arguments."""
    if gate_NF.numel() == 0:
        return
    grads = [
        grad_NF.copy_(x_NF) if grad_NF.is_contiguous() else x_NF.clone(memory_format=torch.contiguous_format)
        for x_NF, grad_NF in ((gate_NF, grad_gate_NF), (up_NF, grad_up_NF))
    ]
    BACKWARD[activation](*grads, grad_output_NF.contiguous())
    for ours_NF, grad_NF in zip(grads, (grad_gate_NF, grad_up_NF), strict=True):
        if ours_NF is not grad_NF:
            grad_NF.copy_(ours_NF)
