"""`rope` out of torch operations: any device, any dtype; keeps cos and sin alone where autograd would keep four products.

Shapes: each x and its output are [B, S, H, D], whatever their strides; cos and sin [B or 1, S, R].
"""

from collections.abc import Sequence

import torch


def forward(
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    cos_BSR: torch.Tensor,
    sin_BSR: torch.Tensor,
    layout: str,
    per_pair: bool,
    inverse: bool,
) -> None:
    """Write each rotated input into its output."""
    for x_BSHD, y_BSHD in zip(inputs, outputs, strict=True):
        (cos_1, cos_2), (sin_1, sin_2) = _tables(cos_BSR, sin_BSR, x_BSHD, layout, per_pair, inverse)
        rotary_dim = 2 * cos_1.shape[-1]
        a, b = (x.to(cos_1.dtype) for x in _pairs(x_BSHD[..., :rotary_dim], layout != "half"))
        y_1, y_2 = _pairs(y_BSHD[..., :rotary_dim], layout == "interleaved")
        y_1.copy_(a * cos_1 - b * sin_1)
        y_2.copy_(b * cos_2 + a * sin_2)
        y_BSHD[..., rotary_dim:].copy_(x_BSHD[..., rotary_dim:])


def backward(
    grad_outputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    cos_BSR: torch.Tensor,
    sin_BSR: torch.Tensor,
    layout: str,
    per_pair: bool,
    inverse: bool,
) -> None:
    """Write the gradient of each input into `grads`."""
    for dy_BSHD, dx_BSHD in zip(grad_outputs, grads, strict=True):
        (cos_1, cos_2), (sin_1, sin_2) = _tables(cos_BSR, sin_BSR, dy_BSHD, layout, per_pair, inverse)
        rotary_dim = 2 * cos_1.shape[-1]
        dy_1, dy_2 = (x.to(cos_1.dtype) for x in _pairs(dy_BSHD[..., :rotary_dim], layout == "interleaved"))
        dx_1, dx_2 = _pairs(dx_BSHD[..., :rotary_dim], layout != "half")
        dx_1.copy_(dy_1 * cos_1 + dy_2 * sin_2)
        dx_2.copy_(dy_2 * cos_2 - dy_1 * sin_1)
        dx_BSHD[..., rotary_dim:].copy_(dy_BSHD[..., rotary_dim:])


def _tables(
    cos_BSR: torch.Tensor, sin_BSR: torch.Tensor, x: torch.Tensor, layout: str, per_pair: bool, inverse: bool
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """cos and sin, each for the first and for the second of the pairs, in the compute dtype."""
    wide = torch.promote_types(torch.promote_types(x.dtype, cos_BSR.dtype), torch.float32)
    cos, sin = (table.to(wide)[:, :, None] for table in (cos_BSR, sin_BSR))
    sin = -sin if inverse else sin
    if per_pair:
        return (cos, cos), (sin, sin)
    return _pairs(cos, layout == "interleaved"), _pairs(sin, layout == "interleaved")


def _pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and of the second of the pairs."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]
