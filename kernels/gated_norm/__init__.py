"""gated_rms_norm: root mean square normalisation with a gate, as Mamba 2 and gated linear attention end with.

    rstd = 1 / sqrt(mean(u^2) + eps)     u_hat = u * rstd     a = act(gate)

    the gate last:   u = x        y = u_hat * weight * a        the gate first:   u = x * a     y = u_hat * weight

    du = rstd * (g - u_hat * mean(g * u_hat))   with g = dy * weight (* a, the gate last)
    the gate last:   dx = du      dgate = dy * u_hat * weight * act'(gate)     dweight = sum over rows of dy * a * u_hat
    the gate first:  dx = du * a  dgate = du * x * act'(gate)                  dweight = sum over rows of dy * u_hat

The gate is activated and multiplied in float32. `order="cast_then_mul"` rounds u_hat, then multiplies by the weight in the
model's dtype, as Qwen3-Next and Mamba 2 do; `"mul_then_cast"` rounds once, as Kimi Linear does. Source: Dao and Gu,
"Transformers are SSMs", 2024.

Saved for backward: x, the gate and one float per row. Floor: 3 passes over x forward, 5 backward.
"""

from typing import Any

import torch

from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_torch, in_triton
from automodel_accel.kernels.gated_norm import reference
from automodel_accel.kernels.launch import rows
from automodel_accel.kernels.registration import Definition, register

ORDERS = ("cast_then_mul", "mul_then_cast")
ACTIVATIONS = tuple(reference.ACTIVATIONS)

KERNEL = Kernel(
    name="gated_rms_norm",
    reference=reference.gated_rms_norm,
    implementations=(
        in_triton("automodel_accel.kernels.gated_norm.fused", max_size=65536),
        in_torch("automodel_accel.kernels.gated_norm.eager"),
    ),
)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    activation: str = "silu",
    gate_first: bool = False,
    order: str = "cast_then_mul",
    implementation: str = AUTO,
) -> torch.Tensor:
    """Normalise the last dimension of `x` and multiply by the activated gate, or the other way round.

    Args:
        x: [..., H], float32, bfloat16, float16 (or float64 for "torch").
        gate: As x.
        weight: [H] of any of these dtypes, or None for no scale.
        eps: Added to the mean square.
        activation: "silu" or "sigmoid", of the gate.
        gate_first: Whether the gate is multiplied before the norm.
        order: "cast_then_mul" or "mul_then_cast": where the result is rounded.
        implementation: "auto", "triton" or "torch".

    Returns:
        [..., H] in x's dtype; with `gate_first` and "cast_then_mul", in the wider of x's and weight's.

    Raises:
        ValueError: shapes or dtypes do not fit, an option is unknown, or the implementation cannot serve the call.
    """
    if gate.shape != x.shape or gate.dtype != x.dtype:
        raise ValueError(
            f"gated_rms_norm: gate is {tuple(gate.shape)} {gate.dtype}, expected {tuple(x.shape)} {x.dtype} as x."
        )
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"gated_rms_norm: weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},) for x {tuple(x.shape)}."
        )
    if order not in ORDERS or activation not in ACTIVATIONS:
        raise ValueError(
            f"gated_rms_norm: order {order!r} with activation {activation!r} is unknown; expected one of {ORDERS} and "
            f"{ACTIVATIONS}."
        )
    return _call(x, gate, weight, eps, activation, gate_first, order, implementation)[0]


def _out_dtype(x: torch.Tensor, weight: torch.Tensor | None, gate_first: bool, order: str) -> torch.dtype:
    by_weight = weight is not None and gate_first and order == "cast_then_mul"
    return torch.promote_types(x.dtype, weight.dtype) if by_weight and weight is not None else x.dtype


def _module(x: torch.Tensor, implementation: str) -> Any:
    return implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation)


def _forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    activation: str,
    gate_first: bool,
    order: str,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    out_dtype = _out_dtype(x, weight, gate_first, order)
    options = (activation, gate_first, order, out_dtype)
    y_NH, rstd_N = _module(x, implementation).forward(rows(x), rows(gate), weight, eps, *options)
    return y_NH.view(x.shape), rstd_N


def _fake_forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    activation: str,
    gate_first: bool,
    order: str,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape, dtype=_out_dtype(x, weight, gate_first, order))
    return y, x.new_empty(x.shape[:-1].numel(), dtype=torch.promote_types(x.dtype, torch.float32))


def _backward(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    activation: str,
    gate_first: bool,
    order: str,
    implementation: str,
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x, grad_gate, grad_weight = _module(x, implementation).backward(
        rows(grad_output), rows(x), rows(gate), weight, rstd, activation, gate_first, order, needs_grad_weight
    )
    return (
        grad_x.view(x.shape),
        grad_gate.view(x.shape),
        grad_weight.to(weight.dtype) if weight is not None and needs_grad_weight else x.new_empty(0),
    )


def _fake_backward(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    activation: str,
    gate_first: bool,
    order: str,
    implementation: str,
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_weight = torch.empty_like(weight) if needs_grad_weight and weight is not None else x.new_empty(0)
    return x.new_empty(x.shape), x.new_empty(x.shape), grad_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, gate, weight, _, *ctx.options = inputs
    ctx.save_for_backward(x, gate, weight, output[1])


def _gradients(ctx: Any, grad_output: torch.Tensor, backward: Any) -> tuple[Any, ...]:
    needs_grad_weight = ctx.needs_input_grad[2]
    *grads, grad_weight = backward(grad_output, *ctx.saved_tensors, *ctx.options, needs_grad_weight)
    return *grads, grad_weight if needs_grad_weight else None, None, None, None, None, None


_call = register(
    "gated_rms_norm",
    Definition(
        forward=_forward,
        backward=_backward,
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        gradients=_gradients,
    ),
)
