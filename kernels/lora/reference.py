"""The definition of a low-rank adapter, in plain differentiable PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from automodel_accel.kernels.lora import Adapter


def low_rank(x: torch.Tensor, adapter: Adapter, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What is added to the linear's product: [..., H] -> [..., F], in the adapter's dtype; `mask` is 0 or 1, of x's shape."""
    x = x.to(adapter.a_RH.dtype)
    x = x if mask is None else x * mask.to(x.dtype)
    return F.linear(F.linear(x, adapter.a_RH), adapter.b_FR) * adapter.form.factor


def beside(
    x: torch.Tensor,
    bases: Sequence[torch.Tensor],
    adapters: Sequence[Adapter],
    *,
    masks: Sequence[torch.Tensor | None] = (),
) -> tuple[torch.Tensor, ...]:
    """[..., H], [..., F_i] each, an adapter each, the mask of its dropout or None each -> [..., F_i] each, in the base's dtype."""
    parts = zip(bases, adapters, masks or [None] * len(bases), strict=True)
    return tuple((base + low_rank(x, adapter, mask).to(base.dtype)).to(base.dtype) for base, adapter, mask in parts)
