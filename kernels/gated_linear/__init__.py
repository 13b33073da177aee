"""gated_linear: the activation of a gated MLP, y = act(gate) * up.

    silu: act(g) = g sigmoid(g)       gelu: act(g) = g (1 + erf(g / sqrt 2)) / 2       gelu_tanh: its approximation by tanh

    dgate = dy * up * act'(gate)          dup = dy * act(gate)

act(gate) is rounded to the activation dtype before it is multiplied, as a model in eager PyTorch rounds it. Gate and up are
two tensors, or the halves of one packed tensor, as one fused projection yields them; a packed input has one packed gradient.
Source: Shazeer, "GLU Variants Improve Transformer", 2020.

Saved for backward: gate and up (the outputs of the projections, which are there anyway), never the activation. Floor: 3 passes
over [N, F] forward, 5 backward; for silu about 6 N F and 10 N F FLOPs, far below what the bytes cost.
"""

from typing import Any

import torch

from automodel_accel.kernels.contract import (
    AUTO,
    Kernel,
    implementation_module,
    in_liger,
    in_torch,
    in_triton,
    unknown_name,
)
from automodel_accel.kernels.gated_linear import reference
from automodel_accel.kernels.launch import rows
from automodel_accel.kernels.registration import Definition, register

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
FEATURES = {name: frozenset({name}) for name in ACTIVATIONS}  # each is one, in the kernel's words
LAYOUTS = reference.LAYOUTS

KERNEL = Kernel(
    name="gated_linear",
    reference=reference.gated_linear,
    implementations=(
        in_triton("automodel_accel.kernels.gated_linear.fused", features=frozenset(ACTIVATIONS)),
        in_torch("automodel_accel.kernels.gated_linear.eager", features=frozenset(ACTIVATIONS)),
        in_liger(
            "automodel_accel.kernels.gated_linear.liger",
            frozenset(ACTIVATIONS),
            {"gelu": "approximates gelu by tanh, where this model has erf"},
        ),
    ),
)


def gated_linear(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    layout: str = "gate_up",
    implementation: str = AUTO,
) -> torch.Tensor:
    """Multiply an activated gate with up, element by element.

    Args:
        gate: [..., F], float32, bfloat16, float16 (or float64 for "torch"); or the packed [..., 2 F] where `up` is None.
        up: [..., F] of gate's dtype, or None.
        activation: "silu", "gelu" (by erf) or "gelu_tanh".
        layout: Which half of a packed tensor is the gate: the first in "gate_up", the second in "up_gate".
        implementation: "auto", "triton", "liger" or "torch".

    Returns:
        [..., F] in gate's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, a name is unknown, or the implementation cannot serve the call.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_linear: {unknown_name('activation', activation, ACTIVATIONS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"gated_linear: {unknown_name('layout', layout, LAYOUTS)}")
    if up is None and gate.shape[-1] % 2:
        raise ValueError(f"gated_linear: packed gate and up {tuple(gate.shape)} cannot be halved; expected [..., 2 F].")
    if up is not None and (up.shape, up.dtype) != (gate.shape, gate.dtype):
        came = f"up is {tuple(up.shape)} {up.dtype}, gate is {tuple(gate.shape)} {gate.dtype}"
        raise ValueError(f"gated_linear: {came}; expected the same shape and dtype.")
    return _call(gate, up, activation, layout, implementation)[0]


def _gate_and_up(gate: torch.Tensor, up: torch.Tensor | None, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.split(rows(gate), layout) if up is None else (rows(gate), rows(up))


def _out_shape(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[int, ...]:
    return (*gate.shape[:-1], gate.shape[-1] // 2) if up is None else tuple(gate.shape)


def _module(gate: torch.Tensor, activation: str, implementation: str) -> Any:
    asked = FEATURES[activation]
    return implementation_module(KERNEL, gate.device.type, gate.dtype, gate.shape[-1], implementation, asked)


def _forward(
    gate: torch.Tensor, up: torch.Tensor | None, activation: str, layout: str, implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    y_NF = _module(gate, activation, implementation).forward(*_gate_and_up(gate, up, layout), activation)
    return y_NF.view(_out_shape(gate, up)), gate.new_empty(
        0
    )  # a registered operation mistakes a tuple of one for a tensor


def _fake_forward(
    gate: torch.Tensor, up: torch.Tensor | None, activation: str, layout: str, implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(_out_shape(gate, up)), gate.new_empty(0)


def _backward(
    grad_output: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    layout: str,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_gate, grad_up = _fake_backward(grad_output, gate, up, activation, layout, implementation)
    grads_NF = _gate_and_up(grad_gate, None if up is None else grad_up, layout)
    inputs_NF = _gate_and_up(gate, up, layout)
    _module(gate, activation, implementation).backward(rows(grad_output), *inputs_NF, activation, *grads_NF)
    return grad_gate, grad_up


def _fake_backward(
    grad_output: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    layout: str,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0) if up is None else up.new_empty(up.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    gate, up, ctx.activation, ctx.layout, ctx.implementation = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx: Any, grad_output: torch.Tensor, backward: Any) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = backward(grad_output, gate, up, ctx.activation, ctx.layout, ctx.implementation)
    return grad_gate, None if up is None else grad_up, None, None, None


_call = register(
    "gated_linear",
    Definition(
        forward=_forward,
        backward=_backward,
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        gradients=_gradients,
    ),
)
