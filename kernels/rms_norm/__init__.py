"""rms_norm: root mean square normalisation of each row.

    rstd = 1 / sqrt(mean(x^2) + eps)         x_hat = x * rstd         y = x_hat * (weight + offset)

    dx = rstd * (g - x_hat * mean(g * x_hat))   with g = dy * (weight + offset)          dweight = sum over rows of dy * x_hat

Models differ in where they round to the activation dtype, and a kernel must round where the model does:
`order="cast_then_mul"` rounds x_hat first, then multiplies (Llama, Qwen); `"mul_then_cast"` multiplies in float32 and rounds
once (Gemma, with offset=1; torch.nn.RMSNorm). Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

Saved for backward: x and one float per row. Floor: 2 passes over x forward, 3 backward; about 5 N H and 11 N H FLOPs.
"""

from typing import Any

import torch

from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_torch, in_triton
from automodel_accel.kernels.launch import rows
from automodel_accel.kernels.registration import Definition, register
from automodel_accel.kernels.rms_norm import reference

ORDERS = ("cast_then_mul", "mul_then_cast")

KERNEL = Kernel(
    name="rms_norm",
    reference=reference.rms_norm,
    implementations=(
        in_triton("automodel_accel.kernels.rms_norm.fused", max_size=65536),
        in_torch("automodel_accel.kernels.rms_norm.eager"),
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
        implementation: "auto", "triton" or "torch".

    Returns:
        [..., H]; in the dtype that torch would give: x's, or the wider of x's and weight's for "cast_then_mul".

    Raises:
        ValueError: the weight's shape does not fit, the order is unknown, or the implementation cannot serve the call.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},) for x {tuple(x.shape)}."
        )
    if order not in ORDERS:
        raise ValueError(f"rms_norm: order {order!r} is unknown; expected one of {ORDERS}.")
    return _call(x, weight, eps, offset, order, implementation)[0]


def _out_dtype(x: torch.Tensor, weight: torch.Tensor | None, order: str) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if weight is not None and order == "cast_then_mul" else x.dtype


def _forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, order: str, implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    module = implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation)
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
    module = implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation)
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
