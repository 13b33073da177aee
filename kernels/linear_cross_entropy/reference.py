"""The definition of `linear_cross_entropy`, in plain differentiable PyTorch."""

import torch
import torch.nn.functional as F

from automodel_accel.kernels.collectives import sum_from
from automodel_accel.kernels.linear_cross_entropy.shard import VocabShard


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: float | torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    shard: VocabShard | None = None,
) -> torch.Tensor:
    """Output head and cross entropy in float32; see `automodel_accel.kernels.linear_cross_entropy.linear_cross_entropy`."""
    logits = F.linear(hidden, weight, bias)
    if lora_x is not None and lora_b is not None:
        logits = (logits + F.linear(lora_x, lora_b)).to(logits.dtype)
    if shard is not None:
        logits = sum_from(F.pad(logits, (shard.start, shard.vocab - shard.stop)), shard.group)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    reduced = reduction if num_items is None else "sum"
    loss = F.cross_entropy(
        logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduced
    )
    if z_loss:
        counts = target != ignore_index
        squares = torch.where(counts, torch.logsumexp(logits, -1).square(), 0.0)
        total = squares if reduced == "none" else squares.sum()
        loss = loss + z_loss * (total / counts.sum() if reduced == "mean" else total)
    return loss if num_items is None else loss / num_items
