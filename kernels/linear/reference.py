"""The definition of `linears`, in plain differentiable PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from automodel_accel.kernels.lora import Adapter
from automodel_accel.kernels.lora.reference import low_rank


def linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    adapters: Sequence[Adapter | None] = (),
    masks: Sequence[torch.Tensor | None] = (),
) -> tuple[torch.Tensor, ...]:
    """[..., H], [F_i, H] each, [F_i] or None each, an adapter or None each, the mask of its dropout or None each -> [..., F_i] each."""
    products = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    for i, (adapter, mask) in enumerate(zip(adapters, masks or [None] * len(adapters), strict=True)):
        if adapter is not None:
            products[i] = (products[i] + low_rank(x, adapter, mask)).to(products[i].dtype)
    return tuple(products)
