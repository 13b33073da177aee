"""`qk_norm_rope` out of torch operations: any device, any dtype; the norm of rms_norm and the rotation of rope, in between wide.

A side is q or k. Shapes of a side: x, y and their gradients are [B, S, H, D], whatever their strides; weight [D]; rstd
[B, S, H]. cos and sin are [B or 1, S, R].
"""

from collections.abc import Sequence

import torch

from automodel_accel.kernels.rms_norm import eager as norm
from automodel_accel.kernels.rope import eager as rotation

WIDE = "mul_then_cast"  # the order in which rms_norm rounds nothing that is wide already


def forward(
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    rstds: Sequence[torch.Tensor],
    cos_BSR: torch.Tensor,
    sin_BSR: torch.Tensor,
    eps: float,
    offset: float,
    layout: str,
    per_pair: bool,
    inverse: bool,
) -> None:
    """Write what each input becomes into its output, and into its rstd."""
    for x_BSHD, y_BSHD, weight_D, rstd_BSH in zip(inputs, outputs, weights, rstds, strict=True):
        normed, rstd = norm.forward(x_BSHD.flatten(0, 2), weight_D, eps, offset, WIDE, rstd_BSH.dtype)
        rstd_BSH.copy_(rstd.view(rstd_BSH.shape))
        rotation.forward([normed.view(x_BSHD.shape)], [y_BSHD], cos_BSR, sin_BSR, layout, per_pair, inverse)


def backward(
    grad_outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    rstds: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    cos_BSR: torch.Tensor,
    sin_BSR: torch.Tensor,
    offset: float,
    layout: str,
    per_pair: bool,
    inverse: bool,
) -> list[torch.Tensor]:
    """Write the gradient of each input into `grads`; return those of the weights, in their dtype."""
    grad_weights = []
    for dy, x, weight, rstd, dx in zip(grad_outputs, inputs, weights, rstds, grads, strict=True):
        turned_back = torch.empty(x.shape, dtype=rstd.dtype, device=x.device)
        rotation.backward([dy], [turned_back], cos_BSR, sin_BSR, layout, per_pair, inverse)
        rows = turned_back.flatten(0, 2), x.flatten(0, 2)
        grad_x, grad_weight = norm.backward(*rows, weight, rstd.flatten(), offset, WIDE, True)
        assert grad_weight is not None
        dx.copy_(grad_x.view(x.shape))
        grad_weights.append(grad_weight)
    return grad_weights
