"""`gated_rms_norm` out of torch operations: any device, any dtype; keeps x, the gate and rstd where autograd would keep eight.

Shapes: x, gate, y and their gradients are [N, H]; weight and grad_weight [H]; rstd [N].
"""

import torch

from automodel_accel.kernels.gated_norm.reference import ACTIVATIONS


def forward(
    x_NH: torch.Tensor,
    gate_NH: torch.Tensor,
    weight_H: torch.Tensor | None,
    eps: float,
    activation: str,
    gate_first: bool,
    order: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [N, H] in `out_dtype`, and rstd [N] in the compute dtype."""
    compute_dtype = torch.promote_types(x_NH.dtype, torch.float32)
    activated = ACTIVATIONS[activation](gate_NH.to(compute_dtype))
    x_wide = x_NH.to(compute_dtype)
    if gate_first:
        x_wide = x_wide * activated
    rstd_N = torch.rsqrt(x_wide.pow(2).mean(-1) + eps)
    normed = x_wide * rstd_N[:, None]
    y = _scaled(normed, x_NH, weight_H, order)
    return (y if gate_first else y * activated).to(out_dtype), rstd_N


def backward(
    grad_output_NH: torch.Tensor,
    x_NH: torch.Tensor,
    gate_NH: torch.Tensor,
    weight_H: torch.Tensor | None,
    rstd_N: torch.Tensor,
    activation: str,
    gate_first: bool,
    order: str,
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return grad_x and grad_gate [N, H] in x's dtype, and grad_weight [H] in the compute dtype (None where not needed)."""
    gate, x_wide, grad = (tensor.to(rstd_N.dtype) for tensor in (gate_NH, x_NH, grad_output_NH))
    activated, slope = ACTIVATIONS[activation](gate), _slope(gate, activation)
    normed = (x_wide * activated if gate_first else x_wide) * rstd_N[:, None]
    if not gate_first:
        grad_gate = grad * _scaled(normed, x_NH, weight_H, order) * slope
        grad = grad * activated
    factor = normed.to(x_NH.dtype) if order == "cast_then_mul" else normed
    grad_weight_H = (grad * factor).sum(0) if needs_grad_weight else None
    if weight_H is not None:
        grad = grad * weight_H.to(rstd_N.dtype)
    along_normed = (grad * normed).mean(-1, keepdim=True)
    grad_x = (grad - normed * along_normed) * rstd_N[:, None]
    if gate_first:
        grad_gate = grad_x * x_wide * slope
        grad_x = grad_x * activated
    return grad_x.to(x_NH.dtype), grad_gate.to(x_NH.dtype), grad_weight_H


def _scaled(normed: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, order: str) -> torch.Tensor:
    """Times the weight, rounded as the order says."""
    if order == "cast_then_mul":
        normed = normed.to(x.dtype)
        return normed if weight is None else normed * weight
    return normed if weight is None else normed * weight.to(normed.dtype)


def _slope(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """The derivative of the activation."""
    sigmoid = torch.sigmoid(gate)
    return sigmoid * (1 + gate * (1 - sigmoid)) if activation == "silu" else sigmoid * (1 - sigmoid)
