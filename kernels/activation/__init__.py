"""activation: y = act(x), element by element, as the MLPs without a gate have it.

    silu: x sigmoid(x)          gelu: x (1 + erf(x / sqrt 2)) / 2          gelu_tanh: its approximation by tanh
    relu: max(x, 0)             relu2: max(x, 0)^2                         quick_gelu: x sigmoid(1.702 x)

    dx = dy * act'(x)

Several of these are many torch operations in the models that use them, each with a tensor of its own kept for backward.
Sources: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; So et al., "Primer", 2021 (relu2).

Saved for backward: x alone; for relu y alone, which the next linear keeps anyway. Floor: 2 passes over [N, F] forward, 3
backward.
"""

from typing import Any

import torch

from automodel_accel.kernels.activation import reference
from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_torch, in_triton, unknown_name
from automodel_accel.kernels.launch import rows
from automodel_accel.kernels.registration import Definition, register

ACTIVATIONS = tuple(reference.ACTIVATIONS)
# torch has each of these as one operation that saves as little as ours
ONE_OPERATION = frozenset({"silu", "gelu", "gelu_tanh", "relu"})

KERNEL = Kernel(
    name="activation",
    reference=reference.activation,
    implementations=(
        in_triton("automodel_accel.kernels.activation.fused"),
        in_torch("automodel_accel.kernels.activation.eager"),
    ),
)


def activation(x: torch.Tensor, name: str, *, implementation: str = AUTO) -> torch.Tensor:
    """Activate every element.

    Args:
        x: [..., F], float32, bfloat16, float16 (or float64 for "torch").
        name: "silu", "gelu" (by erf), "gelu_tanh", "relu", "relu2" or "quick_gelu".
        implementation: "auto", "triton" or "torch". Named, "torch" is torch's own operation where it has one.

    Returns:
        [..., F] in x's dtype.

    Raises:
        ValueError: a name is unknown, or the implementation cannot serve the call.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: {unknown_name('activation', name, ACTIVATIONS)}")
    if implementation == "torch" and name in ONE_OPERATION:
        return reference.activation(x, name)
    return _call(x, name, implementation)[0]


def _module(x: torch.Tensor, implementation: str) -> Any:
    return implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation)


def _forward(x: torch.Tensor, name: str, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """With an empty tensor beside it: a registered operation mistakes a tuple of one for a tensor."""
    return _module(x, implementation).forward(rows(x), name).view(x.shape), x.new_empty(0)


def _fake_forward(x: torch.Tensor, name: str, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(0)


def _backward(
    grad_output: torch.Tensor, kept: torch.Tensor, name: str, implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_x_NF = _module(kept, implementation).backward(rows(grad_output), rows(kept), name)
    return grad_x_NF.view(kept.shape), kept.new_empty(0)


def _fake_backward(
    grad_output: torch.Tensor, kept: torch.Tensor, name: str, implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return kept.new_empty(kept.shape), kept.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, ctx.name, ctx.implementation = inputs
    ctx.save_for_backward(output[0] if ctx.name == "relu" else x)


def _gradients(ctx: Any, grad_output: torch.Tensor, backward: Any) -> tuple[Any, ...]:
    (kept,) = ctx.saved_tensors
    return backward(grad_output, kept, ctx.name, ctx.implementation)[0], None, None


_call = register(
    "activation",
    Definition(
        forward=_forward,
        backward=_backward,
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        gradients=_gradients,
    ),
)
