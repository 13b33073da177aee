"""experts: a mixture of experts, from the routing to the combined output.

    out[t] = sum over k of  w[t,k] * (down[e] act(up[e] x[t] + b_up[e]) + b_down[e]),   e = index[t,k]

Rows are sorted by expert, so that each product is one grouped matrix product; nothing on the way needs the host, and every sum
has a fixed order. Backward, with du = down[e]^T dout[t]:

    dw[t,k] = du . act(z) + dout[t] . b_down[e]      dz = w act'(z) du           ddown[e] = sum over rows of dout (w act(z))^T

The output of an expert is therefore never needed again. Saved for backward: the hidden states and z = up[e] x + b_up[e], of
which the activation is recomputed; not the gathered rows, the activations, or the rows before and after their weights.
An expert without tokens has a gradient of zero. Sources: Shazeer et al., "Outrageously Large Neural Networks", 2017; Gale et
al., "MegaBlocks", 2022.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from automodel_accel.kernels.activation import ACTIVATIONS as ALL_ACTIVATIONS
from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_torch, in_triton, unknown_name
from automodel_accel.kernels.experts import reference
from automodel_accel.kernels.experts.grouped import multiply, outer
from automodel_accel.kernels.gated_linear import ACTIVATIONS as GATED
from automodel_accel.kernels.gated_linear.reference import LAYOUTS as PACKED
from automodel_accel.kernels.registration import Definition, register

LAYOUTS = (*PACKED, "plain")
OWN_GATE = "none"  # the layout where the caller activates

KERNEL = Kernel(
    name="experts",
    reference=reference.experts,
    implementations=(
        in_triton("automodel_accel.kernels.experts.fused"),
        in_torch("automodel_accel.kernels.experts.eager"),
    ),
)


class Routing(NamedTuple):
    """Rows sorted by expert, for T tokens with K slots each.

    Attributes:
        expert: [T K], the expert of each slot.
        order: [T K], the slot t K + k of each row.
        inverse: [T K], the row of each slot.
        offsets: [E], the end of each expert's rows, int32.
    """

    expert: torch.Tensor
    order: torch.Tensor
    inverse: torch.Tensor
    offsets: torch.Tensor


def experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    layout: str = "gate_up",
    is_transposed: bool = False,
    gate: Callable[[torch.Tensor], torch.Tensor] | None = None,
    implementation: str = AUTO,
) -> torch.Tensor:
    """Send each token through its experts, and add their outputs up by weight.

    Args:
        hidden_states: [T, D], float32, bfloat16, float16 (or float64 for "torch").
        top_k_index: [T, K], integers in [0, E).
        top_k_weights: [T, K], floating.
        up: [E, Z, D], or [E, D, Z] where `is_transposed`: Z is 2 F for packed gate and up, else F. In this dtype it is computed.
        down: [E, D, F], or [E, F, D], of up's dtype.
        up_bias: [E, Z] or None.
        down_bias: [E, D] or None.
        activation: "silu", "gelu", "gelu_tanh", or with the layout "plain" any of kernels/activation.
        layout: Which half of Z is the gate: "gate_up" or "up_gate"; "plain" for no gate.
        is_transposed: Whether the weights are stored (in, out).
        gate: In place of activation and layout: a differentiable function [S, Z] -> [S, F] of the sorted rows.
        implementation: "auto", "triton" or "torch".

    Returns:
        [T, D] in the dtype of hidden_states.

    Raises:
        ValueError: shapes or dtypes do not fit, a name is unknown, or the implementation cannot serve the call.
    """
    known = ALL_ACTIVATIONS if layout == "plain" else GATED
    if layout not in LAYOUTS:
        raise ValueError(f"experts: {unknown_name('layout', layout, LAYOUTS)}")
    if activation not in known:
        raise ValueError(f"experts: {unknown_name('activation', activation, known)}")
    _check_shapes(hidden_states, top_k_index, top_k_weights, up, down, is_transposed)
    routing = route(top_k_index, up.shape[0])
    inner, _ = _up(hidden_states, up, up_bias, *routing, is_transposed, implementation)
    if gate is not None:
        inner, layout = gate(inner), OWN_GATE
    form = (activation, layout, is_transposed, hidden_states.dtype, implementation)
    return _down(inner, down, down_bias, top_k_weights, *routing, *form)[0]


def route(top_k_index: torch.Tensor, n_experts: int) -> Routing:
    """Sort the slots of [T, K] by their expert, on the device."""
    expert = top_k_index.reshape(-1)
    sorted_expert, order = torch.sort(expert, stable=True)
    slots = torch.arange(order.shape[0], device=order.device)
    numbers = torch.arange(n_experts, device=order.device, dtype=expert.dtype)
    offsets = torch.searchsorted(sorted_expert, numbers, right=True, out_int32=True)
    return Routing(expert, order, torch.empty_like(order).scatter_(0, order, slots), offsets)


def _check_shapes(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    is_transposed: bool,
) -> None:
    if hidden_states.dim() != 2 or top_k_index.dim() != 2 or hidden_states.shape[0] != top_k_index.shape[0]:
        came = f"hidden_states are {tuple(hidden_states.shape)}, top_k_index is {tuple(top_k_index.shape)}"
        raise ValueError(f"experts: {came}; expected [T, D] and [T, K].")
    if top_k_weights.shape != top_k_index.shape:
        came = f"top_k_weights are {tuple(top_k_weights.shape)}, top_k_index is {tuple(top_k_index.shape)}"
        raise ValueError(f"experts: {came}; expected the same shape.")
    if not hidden_states.is_floating_point():
        raise ValueError(f"experts: hidden_states are {hidden_states.dtype}; expected a floating dtype.")
    size_in, size_out = (up.shape[1], down.shape[2]) if is_transposed else (up.shape[2], down.shape[1])
    if not hidden_states.shape[1] == size_in == size_out or up.dtype != down.dtype or up.shape[0] != down.shape[0]:
        came = f"up is {tuple(up.shape)} {up.dtype}, down is {tuple(down.shape)} {down.dtype}"
        raise ValueError(f"experts: {came}; expected one dtype, and [E, Z, {hidden_states.shape[1]}] with its reverse.")


def _module(like: torch.Tensor, implementation: str) -> Any:
    return implementation_module(KERNEL, like.device.type, like.dtype, like.shape[-1], implementation)


def _in_out(weight: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    """A view of the weights as [E, in, out]."""
    return weight if is_transposed else weight.transpose(1, 2)


def _weight_gradient(
    inputs_SI: torch.Tensor, grad_SO: torch.Tensor, offsets: torch.Tensor, is_transposed: bool
) -> torch.Tensor:
    return outer(inputs_SI, grad_SO, offsets) if is_transposed else outer(grad_SO, inputs_SI, offsets)


def _tokens_of(order: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """The token of each row."""
    return order // max(order.shape[0] // max(n_tokens, 1), 1)


def _up_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    expert: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    is_transposed: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _module(weight, implementation)  # refuses what it cannot serve
    rows = x.index_select(0, _tokens_of(order, x.shape[0])).to(weight.dtype)
    inner = multiply(rows, _in_out(weight, is_transposed), offsets)
    if bias is not None:
        inner += bias.index_select(0, expert.index_select(0, order))
    return inner, inner.new_empty(0)  # a registered operation mistakes a tuple of one for a tensor


def _up_fake_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    expert: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    is_transposed: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return weight.new_empty(order.shape[0], weight.shape[2 if is_transposed else 1]), weight.new_empty(0)


def _up_backward(
    grad_inner: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    is_transposed: bool,
    implementation: str,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    module = _module(weight, implementation)
    grad_inner = grad_inner.contiguous()
    grad_x, grad_weight, grad_bias = (weight.new_empty(0) for _ in range(3))
    if wanted[0]:
        grad_rows = multiply(grad_inner, _in_out(weight, is_transposed).transpose(1, 2), offsets)
        grad_x = module.combine(grad_rows, None, None, order, inverse, x.shape[0], x.dtype)
    if wanted[1]:
        rows = x.index_select(0, _tokens_of(order, x.shape[0])).to(weight.dtype)
        grad_weight = _weight_gradient(rows, grad_inner, offsets, is_transposed)
    if wanted[2]:
        grad_bias = module.sum_rows(grad_inner, offsets)
    return grad_x, grad_weight, grad_bias


def _up_fake_backward(
    grad_inner: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    is_transposed: bool,
    implementation: str,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape) if wanted[0] else weight.new_empty(0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        weight.new_empty((offsets.shape[0], grad_inner.shape[1]) if wanted[2] else 0),
    )


def _up_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _, _, order, inverse, offsets, *ctx.form = inputs
    ctx.save_for_backward(x, weight, order, inverse, offsets)


def _up_gradients(ctx: Any, grad_output: torch.Tensor, backward: Any) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    grads = backward(grad_output, *ctx.saved_tensors, *ctx.form, wanted)
    return *_only(wanted, grads), *[None] * 6


def _only(wanted: list[bool], grads: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
    return [grad if want else None for want, grad in zip(wanted, grads, strict=True)]


_up = register(
    "experts_up",
    Definition(
        forward=_up_forward,
        backward=_up_backward,
        fake_forward=_up_fake_forward,
        fake_backward=_up_fake_backward,
        setup_context=_up_setup_context,
        gradients=_up_gradients,
    ),
)


def _down_forward(
    inner: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k_weights: torch.Tensor,
    expert: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    activation: str,
    layout: str,
    is_transposed: bool,
    dtype: torch.dtype,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    module = _module(weight, implementation)
    activated = module.activate(inner.contiguous(), activation, layout)
    y_SD = multiply(activated, _in_out(weight, is_transposed), offsets)
    weights_TK = top_k_weights.contiguous()
    return module.combine(y_SD, weights_TK, bias, expert, inverse, weights_TK.shape[0], dtype), weight.new_empty(0)


def _down_fake_forward(
    inner: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k_weights: torch.Tensor,
    expert: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    activation: str,
    layout: str,
    is_transposed: bool,
    dtype: torch.dtype,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return weight.new_empty(
        top_k_weights.shape[0], weight.shape[2 if is_transposed else 1], dtype=dtype
    ), weight.new_empty(0)


def _down_backward(
    grad_output: torch.Tensor,
    inner: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k_weights: torch.Tensor,
    expert: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    activation: str,
    layout: str,
    is_transposed: bool,
    implementation: str,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    module = _module(weight, implementation)
    weights_TK = top_k_weights.contiguous()
    grad_rows = grad_output.index_select(0, _tokens_of(order, grad_output.shape[0])).to(weight.dtype)
    grad_activated = multiply(grad_rows, _in_out(weight, is_transposed).transpose(1, 2), offsets)
    form = (inner.contiguous(), weights_TK, order, activation, layout)
    grad_inner, weighted, grad_weights = module.differentiate(grad_activated, *form)
    grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    if wanted[1]:
        grad_weight = _weight_gradient(weighted, grad_rows, offsets, is_transposed)
    if bias is not None:
        of_row = expert.index_select(0, order)
        share = (grad_rows.to(grad_weights.dtype) * bias.index_select(0, of_row)).sum(1)
        grad_weights = grad_weights + share.index_select(0, inverse)
        if wanted[2]:
            weights_S1 = weights_TK.reshape(-1).index_select(0, order).unsqueeze(1)
            grad_bias = module.sum_rows((grad_rows * weights_S1).to(weight.dtype), offsets)
    grad_weights = grad_weights.view(weights_TK.shape).to(weights_TK.dtype)
    return grad_inner, grad_weight, grad_bias, grad_weights if wanted[3] else weight.new_empty(0)


def _down_fake_backward(
    grad_output: torch.Tensor,
    inner: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k_weights: torch.Tensor,
    expert: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    activation: str,
    layout: str,
    is_transposed: bool,
    implementation: str,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        inner.new_empty(inner.shape),
        weight.new_empty(weight.shape if wanted[1] else 0),
        weight.new_empty((offsets.shape[0], grad_output.shape[1]) if wanted[2] else 0),
        top_k_weights.new_empty(top_k_weights.shape) if wanted[3] else weight.new_empty(0),
    )


def _down_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.layout, ctx.is_transposed, _, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _down_gradients(ctx: Any, grad_output: torch.Tensor, backward: Any) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    form = (ctx.activation, ctx.layout, ctx.is_transposed, ctx.implementation)
    grads = backward(grad_output, *ctx.saved_tensors, *form, wanted)
    return *_only(wanted, grads), *[None] * 9


_down = register(
    "experts_down",
    Definition(
        forward=_down_forward,
        backward=_down_backward,
        fake_forward=_down_fake_forward,
        fake_backward=_down_fake_backward,
        setup_context=_down_setup_context,
        gradients=_down_gradients,
    ),
)
