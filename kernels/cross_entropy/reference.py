"""The definition of `cross_entropy`, in plain differentiable PyTorch."""

import torch
import torch.nn.functional as F


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy in float32; see `automodel_accel.kernels.cross_entropy.cross_entropy`."""
    z = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32)) * scale
    target_N = target.flatten()
    counts = target_N != ignore_index
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z, target_N, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    if z_loss:
        loss = loss + torch.where(counts, z_loss * torch.logsumexp(z, -1).square(), 0.0)
    weight = counts.to(loss.dtype)
    if token_weight is not None:
        weight = torch.where(counts, token_weight.flatten().to(loss.dtype), 0.0)
        loss = torch.where(counts, loss * weight, 0.0)
    if reduction == "none":
        return loss.view(target.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (weight.sum() if num_items is None else num_items)
