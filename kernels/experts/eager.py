"""What `experts` does between and after its matrix products, out of torch operations: any device, any dtype.

Shapes: S = T K rows sorted by expert; inner [S, F] or, packed, [S, 2 F]; y [S, D]; order [S], the slot t K + k of each row;
inverse [S], the row of each slot; expert [T K], the expert of each slot; router weights [T, K].
"""

import torch

from automodel_accel.kernels.activation import eager as plain
from automodel_accel.kernels.experts.grouped import sum_rows
from automodel_accel.kernels.gated_linear import eager as gated
from automodel_accel.kernels.gated_linear.reference import LAYOUTS, split

__all__ = ["activate", "combine", "differentiate", "sum_rows"]


def activate(inner: torch.Tensor, activation: str, layout: str) -> torch.Tensor:
    """The activated rows, [S, F]."""
    if layout in LAYOUTS:
        return gated.forward(*split(inner, layout), activation)
    return plain.forward(inner, activation) if layout == "plain" else inner


def combine(
    y_SD: torch.Tensor,
    weights_TK: torch.Tensor | None,
    bias_ED: torch.Tensor | None,
    expert: torch.Tensor,
    inverse: torch.Tensor,
    n_tokens: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The sum over the slots of each token of weight * (y + bias), [T, D]; weights of one where none are given."""
    if n_tokens == 0:
        return y_SD.new_empty(0, y_SD.shape[1], dtype=dtype)
    slots = y_SD.index_select(0, inverse)
    if bias_ED is not None:
        slots += bias_ED.index_select(0, expert)
    slots_TKD = slots.view(n_tokens, inverse.shape[0] // n_tokens, y_SD.shape[1])
    if weights_TK is not None:
        weights = weights_TK.unsqueeze(-1)
        in_place = torch.promote_types(weights.dtype, slots.dtype) == slots.dtype
        slots_TKD = slots_TKD.mul_(weights) if in_place else slots_TKD * weights
    return slots_TKD.sum(1).to(dtype)


def differentiate(
    grad_activated: torch.Tensor,
    inner: torch.Tensor,
    weights_TK: torch.Tensor,
    order: torch.Tensor,
    activation: str,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the gradient of the rows before their weights: gradients of inner, activated rows times weight, gradients of the weights [T K].

    `grad_activated` is used up.
    """
    weights_S1 = weights_TK.reshape(-1).index_select(0, order).unsqueeze(1)
    if layout in LAYOUTS:
        grad_inner = torch.empty_like(inner)
        (gate, up), (grad_gate, grad_up) = split(inner, layout), split(grad_inner, layout)
        activated = plain.activate(gate, activation, grad_up) * up
    else:
        activated = plain.forward(inner, activation) if layout == "plain" else inner.clone()
    grad_weights = _dot(grad_activated, activated)
    grad_rows = grad_activated.mul_(weights_S1)
    if layout in LAYOUTS:
        grad_up.mul_(grad_rows)
        plain.differentiate(torch.mul(grad_rows, up, out=grad_gate), gate, activation, grad_gate)
    else:
        grad_inner = plain.backward(grad_rows, inner, activation) if layout == "plain" else grad_rows
    return grad_inner, activated.mul_(weights_S1), torch.empty_like(grad_weights).scatter_(0, order, grad_weights)


def _dot(a_SF: torch.Tensor, b_SF: torch.Tensor) -> torch.Tensor:
    """The inner product of each row, [S], in float32 or wider."""
    wide = torch.promote_types(torch.float32, a_SF.dtype)
    return torch.mul(a_SF.to(wide), b_SF).sum(1)
