"""layer_norm: each row minus its mean, over its standard deviation.

    mean = mean(x)     rstd = 1 / sqrt(mean((x - mean)^2) + eps)     x_hat = (x - mean) * rstd     y = x_hat * w + bias

    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))   with g = dy * w     dweight = sum over rows of dy * x_hat
                                                                               dbias = sum over rows of dy

w is weight + offset in the weight's dtype. All else is float32, rounded once (torch.nn.LayerNorm; Cohere). `add_layer_norm` adds
the residual first: h = residual + scale * x, rounded as the model rounds it, of which y is the norm; the gradient of h is then
dx plus the gradient that h receives elsewhere. Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.

Saved for backward: x (or h), and two floats per row. Floor: 2 passes over x forward, 3 backward; with the residual 4 and 4.
"""

import functools
from typing import Any

import torch

from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_liger, in_te, in_torch, in_triton
from automodel_accel.kernels.launch import rows
from automodel_accel.kernels.layer_norm import reference
from automodel_accel.kernels.registration import Definition, register

ORDERS = ("mul_then_cast",)
NO_WEIGHT = "norms without a weight"
NO_BIAS = "norms without a bias"
OFFSETS = "offsets"
MIXED = "parameters of another dtype"
SUMS = "residual sums"
FEATURES = frozenset({NO_WEIGHT, NO_BIAS, OFFSETS, MIXED, SUMS})

KERNEL = Kernel(
    name="layer_norm",
    reference=reference.layer_norm,
    implementations=(
        in_triton("automodel_accel.kernels.layer_norm.fused", max_size=65536, features=FEATURES),
        in_torch("automodel_accel.kernels.layer_norm.eager", features=FEATURES),
        in_te(
            "automodel_accel.kernels.layer_norm.te",
            FEATURES,
            {
                NO_WEIGHT: "asks for a weight",
                NO_BIAS: "asks for a bias",
                OFFSETS: "adds the offset in float32, where this model rounds the sum",
                MIXED: "asks for parameters of x's dtype",
                SUMS: "norms one tensor, not a sum",
            },
        ),
        in_liger(
            "automodel_accel.kernels.layer_norm.liger",
            FEATURES,
            {
                NO_WEIGHT: "asks for a weight",
                NO_BIAS: "asks for a bias",
                OFFSETS: "adds no offset",
                SUMS: "norms one tensor, not a sum",
            },
            # in float32 a row of equal elements shows how its mean was rounded, 1000 times torch's error
            dtypes=frozenset({torch.bfloat16, torch.float16}),
        ),
    ),
)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    order: str = "mul_then_cast",
    implementation: str = AUTO,
) -> torch.Tensor:
    """Normalise the last dimension of `x`.

    Args:
        x: [..., H], float32, bfloat16, float16 (or float64 for "torch").
        weight: [H] of any of these dtypes, or None for no scale.
        bias: [H] of any of these dtypes, or None.
        eps: Added to the variance.
        offset: Added to the weight, in the weight's dtype; 1.0 for models that store weight - 1.
        order: "mul_then_cast", the only one: the result is rounded once.
        implementation: "auto", "triton", "te", "liger" or "torch".

    Returns:
        [..., H] in x's dtype.

    Raises:
        ValueError: a parameter's shape does not fit, the order is unknown, or the implementation cannot serve the call.
    """
    _check(x, weight, bias, order)
    if implementation == "torch" or (implementation == AUTO and x.is_cpu):
        return reference.layer_norm(x, weight, bias, eps, offset)  # one operation of torch's, with its own gradient
    return _call(x, weight, bias, eps, offset, implementation)[0]


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
    order: str = "mul_then_cast",
    implementation: str = AUTO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` to the residual and normalise the sum, in one pass.

    Args:
        x: [..., H], float32, bfloat16, float16 (or float64 for "torch"): the output of a branch.
        residual: The same shape, of any of these dtypes.
        weight: [H] or None, as for `layer_norm`.
        bias: [H] or None.
        eps: Added to the variance.
        scale: Times x; where it is not 1, the product is rounded to x's dtype, as in torch.
        offset: Added to the weight, in the weight's dtype.
        order: "mul_then_cast".
        implementation: "auto", "triton" or "torch".

    Returns:
        (y, h): the norm of h, and h = residual + scale * x, both [..., H] in the dtype that torch would give the sum.

    Raises:
        ValueError: shapes do not fit, the order is unknown, or the implementation cannot serve the call.
    """
    if x.shape != residual.shape:
        raise ValueError(
            f"layer_norm: x has shape {tuple(x.shape)}, residual {tuple(residual.shape)}; expected the same."
        )
    _check(x, weight, bias, order)
    y, h, *_ = _call_add(x, residual, weight, bias, eps, scale, offset, implementation)
    return y, h


def _check(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, order: str) -> None:
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm: {name} has shape {tuple(parameter.shape)}, expected ({x.shape[-1]},) for x {tuple(x.shape)}."
            )
    if order not in ORDERS:
        raise ValueError(f"layer_norm: order {order!r} is unknown; expected one of {ORDERS}.")


@functools.cache
def features(
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    offset: float = 0.0,
    summed: bool = False,
) -> frozenset[str]:
    """What a norm of x in `dtype` asks for beyond the plain one; None is the dtype of a parameter that is not there."""
    asked = {
        NO_WEIGHT: weight_dtype is None,
        NO_BIAS: bias_dtype is None,
        OFFSETS: offset != 0.0,
        MIXED: any(other not in (None, dtype) for other in (weight_dtype, bias_dtype)),
        SUMS: summed,
    }
    return frozenset(name for name, wanted in asked.items() if wanted)


def _module(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    offset: float,
    summed: bool,
    implementation: str,
) -> Any:
    dtypes = (None if parameter is None else parameter.dtype for parameter in (weight, bias))
    asked = features(x.dtype, *dtypes, offset, summed)
    return implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation, asked)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    module = _module(x, weight, bias, offset, False, implementation)
    y_NH, _, mean_N, rstd_N = module.forward(rows(x), None, weight, bias, eps, 1.0, offset)
    return y_NH.view(x.shape), mean_N, rstd_N


def _fake_statistic(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), _fake_statistic(x), _fake_statistic(x)


def _forward_add(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scale: float,
    offset: float,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    forward = _module(x, weight, bias, offset, True, implementation).forward
    y_NH, h_NH, mean_N, rstd_N = forward(rows(x), rows(residual), weight, bias, eps, scale, offset)
    return y_NH.view(x.shape), h_NH.view(x.shape), mean_N, rstd_N


def _fake_forward_add(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    scale: float,
    offset: float,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return torch.empty_like(h), h, _fake_statistic(h), _fake_statistic(h)


def _backward(
    grad_y: torch.Tensor,
    grad_h: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    implementation: str,
    needs_grad_weight: bool,
    needs_grad_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    summed = grad_h is not None
    grad_sum, grad_weight, grad_bias = _module(h, weight, bias, offset, summed, implementation).backward(
        rows(grad_y),
        None if grad_h is None else rows(grad_h),
        rows(h),
        weight,
        mean,
        rstd,
        offset,
        needs_grad_weight,
        needs_grad_bias,
    )
    return (
        grad_sum.view(h.shape),
        grad_weight.to(weight.dtype) if weight is not None and needs_grad_weight else h.new_empty(0),
        grad_bias.to(bias.dtype) if bias is not None and needs_grad_bias else h.new_empty(0),
    )


def _fake_backward(
    grad_y: torch.Tensor,
    grad_h: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    implementation: str,
    needs_grad_weight: bool,
    needs_grad_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        h.new_empty(h.shape),
        torch.empty_like(weight) if weight is not None and needs_grad_weight else h.new_empty(0),
        torch.empty_like(bias) if bias is not None and needs_grad_bias else h.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, _, ctx.offset, ctx.implementation = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _gradients(ctx: Any, grad_y: torch.Tensor, backward: Any) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[index] for index in (1, 2)]
    grad_x, *grads = backward(grad_y, None, *ctx.saved_tensors, ctx.offset, ctx.implementation, *needs)
    return grad_x, *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


def _setup_context_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, bias, _, ctx.scale, ctx.offset, ctx.implementation = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight, bias, *output[2:])


def _gradients_add(ctx: Any, grad_outputs: tuple[torch.Tensor | None, ...], backward: Any) -> tuple[Any, ...]:
    grad_y, grad_h = grad_outputs
    needs_x, needs_residual, *needs = ctx.needs_input_grad[:4]
    grads: list[torch.Tensor | None] = [None, None]
    grad_sum = grad_h
    if grad_y is not None:
        grad_sum, *found = backward(grad_y, grad_h, *ctx.saved_tensors, ctx.offset, ctx.implementation, *needs)
        grads = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    grad_x = _scaled(_to(grad_sum, ctx.dtypes[0]), ctx.scale) if needs_x else None
    return grad_x, _to(grad_sum, ctx.dtypes[1]) if needs_residual else None, *grads, None, None, None, None


def _to(grad: Any, dtype: torch.dtype) -> torch.Tensor:
    return grad.to(dtype)  # type: ignore[no-any-return]


def _scaled(grad: torch.Tensor, scale: float) -> torch.Tensor:
    return grad if scale == 1.0 else grad * scale


_call = register(
    "layer_norm",
    Definition(
        forward=_forward,
        backward=_backward,
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        gradients=_gradients,
    ),
)

_call_add = register(
    "add_layer_norm",
    Definition(
        forward=_forward_add,
        backward=_backward,
        fake_forward=_fake_forward_add,
        fake_backward=_fake_backward,
        setup_context=_setup_context_add,
        gradients=_gradients_add,
        differentiable=2,
    ),
)
