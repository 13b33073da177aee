"""rms_norm: root mean square normalisation of each row.

    rstd = 1 / sqrt(mean(x^2) + eps)         x_hat = x * rstd         y = x_hat * (weight + offset)

    dx = rstd * (g - x_hat * mean(g * x_hat))   with g = dy * (weight + offset)          dweight = sum over rows of dy * x_hat

Models differ in where they round to the activation dtype, and a kernel must round where the model does:
`order="cast_then_mul"` rounds x_hat first, then multiplies (Llama, Qwen); `"mul_then_cast"` multiplies in float32 and rounds
once (Gemma, with offset=1; torch.nn.RMSNorm). Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

Saved for backward: x and one float per row. Floor: 2 passes over x forward, 3 backward; about 5 N H and 11 N H FLOPs.

add_rms_norm: the norm of a residual sum, h = residual + scale * x and y = rms_norm(h). With dh the gradient that h receives
from elsewhere, dresidual = dh + (dx of the norm at h) and dx = scale * dresidual. Floor: 4 passes forward, 4 backward.
"""

import functools
from typing import Any

import torch

from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_liger, in_te, in_torch, in_triton
from automodel_accel.kernels.launch import rows
from automodel_accel.kernels.registration import Definition, register
from automodel_accel.kernels.rms_norm import reference

ORDERS = ("cast_then_mul", "mul_then_cast")
NO_WEIGHT = "norms without a weight"
ROUNDED = "x_hat rounded before the weight"
OFFSETS = "offsets other than 1"
ROUNDED_OFFSETS = "offsets rounded with the weight"
MIXED = "weights of another dtype"
WIDENING = "weights that widen the result"
FEATURES = frozenset({NO_WEIGHT, ROUNDED, OFFSETS, ROUNDED_OFFSETS, MIXED, WIDENING})

KERNEL = Kernel(
    name="rms_norm",
    reference=reference.rms_norm,
    implementations=(
        in_triton("automodel_accel.kernels.rms_norm.fused", max_size=65536, features=FEATURES),
        in_torch("automodel_accel.kernels.rms_norm.eager", features=FEATURES),
        in_te(
            "automodel_accel.kernels.rms_norm.te",
            FEATURES,
            {
                NO_WEIGHT: "asks for a weight",
                ROUNDED: "multiplies with the weight in float32, where this model rounds first",
                OFFSETS: "adds 1 to the weight or nothing",
                ROUNDED_OFFSETS: "adds the offset in float32, where this model rounds the sum",
                MIXED: "asks for a weight of x's dtype",
                WIDENING: "returns x's dtype, where torch gives the weight's",
            },
        ),
        in_liger(
            "automodel_accel.kernels.rms_norm.liger",
            FEATURES,
            {
                ROUNDED_OFFSETS: "adds the offset in float32, where this model rounds the sum",
                WIDENING: "returns x's dtype, where torch gives the weight's",
            },
        ),
    ),
)

ADD_KERNEL = Kernel(
    name="add_rms_norm",
    reference=reference.add_rms_norm,  # type: ignore[arg-type]  # two outputs
    implementations=(
        in_triton("automodel_accel.kernels.rms_norm.add_fused", max_size=65536),
        in_torch("automodel_accel.kernels.rms_norm.add_eager"),
    ),
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    order: str = "cast_then_mul",
    implementation: str = AUTO,
) -> torch.Tensor:
    """Normalise the last dimension of `x`.

    Args:
        x: [..., H], float32, bfloat16, float16 (or float64 for "torch").
        weight: [H] of any of these dtypes, or None for no scale.
        eps: Added to the mean square.
        offset: Added to the weight; 1.0 for models that store weight - 1.
        order: "cast_then_mul" or "mul_then_cast": where the result is rounded.
        implementation: "auto", "triton", "te", "liger" or "torch".

    Returns:
        [..., H]; in the dtype that torch would give: x's, or the wider of x's and weight's for "cast_then_mul".

    Raises:
        ValueError: the weight's shape does not fit, the order is unknown, or the implementation cannot serve the call.
    """
    _check(x, weight, order)
    return _call(x, weight, eps, offset, order, implementation)[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    order: str = "cast_then_mul",
    scale: float = 1.0,
    implementation: str = AUTO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` to the residual and normalise the sum, in one pass.

    Args:
        x: [..., H], the output of a branch; dtypes as for `rms_norm`.
        residual: The same shape, in x's dtype or another.
        weight: [H] or None, as for `rms_norm`.
        eps: Added to the mean square.
        offset: Added to the weight.
        order: "cast_then_mul" or "mul_then_cast".
        scale: Times x; where it is not 1, the product is rounded to x's dtype, as in torch.
        implementation: "auto", "triton" or "torch".

    Returns:
        (y, h), both [..., H]: h = residual + scale * x in the dtype that torch would give the sum, and y = rms_norm(h).

    Raises:
        ValueError: shapes do not fit, the order is unknown, or the implementation cannot serve the call.
    """
    if x.shape != residual.shape:
        raise ValueError(
            f"add_rms_norm: x has shape {tuple(x.shape)}, residual {tuple(residual.shape)}; expected the same."
        )
    _check(x, weight, order)
    y, h, _ = _call_add(x, residual, weight, eps, offset, order, scale, implementation)
    return y, h


def _check(x: torch.Tensor, weight: torch.Tensor | None, order: str) -> None:
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},) for x {tuple(x.shape)}."
        )
    if order not in ORDERS:
        raise ValueError(f"rms_norm: order {order!r} is unknown; expected one of {ORDERS}.")


def _out_dtype(x: torch.Tensor, weight: torch.Tensor | None, order: str) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if weight is not None and order == "cast_then_mul" else x.dtype


@functools.cache
def features(dtype: torch.dtype, weight_dtype: torch.dtype | None, offset: float, order: str) -> frozenset[str]:
    """What a norm of x in `dtype` asks for beyond the plain one; `weight_dtype` is None where it has no weight."""
    rounded = order == "cast_then_mul"
    if weight_dtype is None:
        return frozenset({NO_WEIGHT, ROUNDED} if rounded else {NO_WEIGHT})
    asked = {
        ROUNDED: rounded,
        OFFSETS: offset not in (0.0, 1.0),
        ROUNDED_OFFSETS: rounded and offset != 0.0,
        MIXED: weight_dtype != dtype,
        WIDENING: rounded and torch.promote_types(dtype, weight_dtype) != dtype,
    }
    return frozenset(name for name, wanted in asked.items() if wanted)


def _module(x: torch.Tensor, weight: torch.Tensor | None, offset: float, order: str, implementation: str) -> Any:
    asked = features(x.dtype, None if weight is None else weight.dtype, offset, order)
    return implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation, asked)


def _forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, order: str, implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    module = _module(x, weight, offset, order, implementation)
    y_NH, rstd_N = module.forward(rows(x), weight, eps, offset, order, _out_dtype(x, weight, order))
    return y_NH.view(x.shape), rstd_N


def _fake_forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, order: str, implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape, dtype=_out_dtype(x, weight, order))
    return y, x.new_empty(x.shape[:-1].numel(), dtype=torch.promote_types(x.dtype, torch.float32))


def _backward(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    order: str,
    implementation: str,
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    module = _module(x, weight, offset, order, implementation)
    grad_x, grad_weight = module.backward(rows(grad_output), rows(x), weight, rstd, offset, order, needs_grad_weight)
    return grad_x.view(x.shape), grad_x.new_empty(0) if grad_weight is None else grad_weight


def _fake_backward(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    order: str,
    implementation: str,
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_weight = torch.empty_like(weight) if needs_grad_weight and weight is not None else x.new_empty(0)
    return x.new_empty(x.shape), grad_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _, ctx.offset, ctx.order, ctx.implementation = inputs
    ctx.save_for_backward(x, weight, output[1])


def _gradients(ctx: Any, grad_output: torch.Tensor, backward: Any) -> tuple[Any, ...]:
    x, weight, rstd = ctx.saved_tensors
    needs_grad_weight = weight is not None and ctx.needs_input_grad[1]
    options = (ctx.offset, ctx.order, ctx.implementation, needs_grad_weight)
    grad_x, grad_weight = backward(grad_output, x, weight, rstd, *options)
    return grad_x, grad_weight if needs_grad_weight else None, None, None, None, None


def _sum_dtype(x: torch.Tensor, residual: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, residual.dtype)


def _add_forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    order: str,
    scale: float,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = _sum_dtype(x, residual)
    module = implementation_module(ADD_KERNEL, x.device.type, dtype, x.shape[-1], implementation)
    out_dtype = _out_dtype(x.new_empty(0, dtype=dtype), weight, order)
    y_NH, h_NH, rstd_N = module.forward(rows(x), rows(residual), weight, eps, offset, order, scale, out_dtype)
    return y_NH.view(x.shape), h_NH.view(x.shape), rstd_N


def _add_fake_forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    order: str,
    scale: float,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h = x.new_empty(x.shape, dtype=_sum_dtype(x, residual))
    y, rstd = _fake_forward(h, weight, eps, offset, order, implementation)
    return y, h, rstd


def _add_backward(
    grad_y: torch.Tensor,
    grad_h: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    order: str,
    scale: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    implementation: str,
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    module = implementation_module(ADD_KERNEL, h.device.type, h.dtype, h.shape[-1], implementation)
    grad_h_NH = None if grad_h is None else rows(grad_h)
    options = (offset, order, scale, (x_dtype, residual_dtype), needs_grad_weight)
    grad_residual, grad_x, grad_weight = module.backward(rows(grad_y), grad_h_NH, rows(h), weight, rstd, *options)
    return (
        grad_residual.view(h.shape),
        h.new_empty(0) if grad_x is None else grad_x.view(h.shape),
        h.new_empty(0) if grad_weight is None else grad_weight,
    )


def _add_fake_backward(
    grad_y: torch.Tensor,
    grad_h: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    order: str,
    scale: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    implementation: str,
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    apart = scale != 1.0 or x_dtype != residual_dtype
    return (
        h.new_empty(h.shape, dtype=residual_dtype),
        h.new_empty(h.shape, dtype=x_dtype) if apart else h.new_empty(0),
        torch.empty_like(weight) if needs_grad_weight and weight is not None else h.new_empty(0),
    )


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, _, ctx.offset, ctx.order, ctx.scale, ctx.implementation = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.set_materialize_grads(False)  # an unused norm's weight has no gradient, compiled as well


def _add_gradients(ctx: Any, grad_outputs: tuple[torch.Tensor | None, ...], backward: Any) -> tuple[Any, ...]:
    grad_y, grad_h = grad_outputs
    apart = ctx.scale != 1.0 or ctx.dtypes[0] != ctx.dtypes[1]
    grad_x = grad_residual = grad_weight = None
    if grad_y is not None:
        h, weight, rstd = ctx.saved_tensors
        needs_grad_weight = weight is not None and ctx.needs_input_grad[2]
        options = (ctx.offset, ctx.order, ctx.scale, *ctx.dtypes, ctx.implementation, needs_grad_weight)
        grad_residual, grad_x, grad_weight = backward(grad_y, grad_h, h, weight, rstd, *options)
        grad_weight = grad_weight if needs_grad_weight else None
    elif grad_h is not None:
        grad_residual, grad_x = grad_h.to(ctx.dtypes[1]), (grad_h * ctx.scale).to(ctx.dtypes[0]) if apart else None
    return grad_x if apart else grad_residual, grad_residual, grad_weight, None, None, None, None, None


_call = register(
    "rms_norm",
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
    "add_rms_norm",
    Definition(
        forward=_add_forward,
        backward=_add_backward,
        fake_forward=_add_fake_forward,
        fake_backward=_add_fake_backward,
        setup_context=_add_setup_context,
        gradients=_add_gradients,
        differentiable=2,
    ),
)
