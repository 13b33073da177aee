"""The definition of `rope`, in plain differentiable PyTorch."""

import torch


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str = "half",
    head_axis: int = 1,
    per_pair: bool = False,
    inverse: bool = False,
    keep_dtype: bool = False,
) -> torch.Tensor:
    """Rotate the pairs of one tensor, rounded once at the end; see `automodel_accel.kernels.rope.rope`."""
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    out_dtype = x.dtype if keep_dtype else torch.promote_types(x.dtype, cos.dtype)
    cos, sin = (_per_element(table.to(wide), layout, per_pair).unsqueeze(head_axis - x.dim()) for table in (cos, sin))
    rotary, rest = x[..., : cos.shape[-1]].to(wide), x[..., cos.shape[-1] :]
    if layout == "deinterleaved":
        rotary = torch.cat((rotary[..., ::2], rotary[..., 1::2]), -1)
    turned = _quarter_turn(rotary, layout) * sin
    rotated = rotary * cos - turned if inverse else rotary * cos + turned
    return torch.cat((rotated.to(out_dtype), rest.to(out_dtype)), -1)


def _per_element(table: torch.Tensor, layout: str, per_pair: bool) -> torch.Tensor:
    if not per_pair:
        return table
    return table.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat((table, table), -1)


def _quarter_turn(x: torch.Tensor, layout: str) -> torch.Tensor:
    """(a, b) -> (-b, a) for each pair."""
    if layout == "interleaved":
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
