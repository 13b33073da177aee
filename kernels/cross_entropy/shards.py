"""`cross_entropy` of logits that are cut along the vocabulary over ranks, each of which has some classes of every row.

Forward is one pass over this rank's logits and one all-gather of 20 bytes a row (linear_cross_entropy/shard.py); backward is
without a collective, and writes over a copy of the logits: one pass more than the floor. Shapes as in eager.py.
"""

from dataclasses import dataclass

import torch

from automodel_accel.kernels.linear_cross_entropy.shard import Sharded


@dataclass(frozen=True, slots=True)
class ShardedRows:
    """What an implementation's two functions do with whole rows, done with this rank's classes of them."""

    rows: Sharded

    def forward(
        self,
        logits_NV: torch.Tensor,
        target_N: torch.Tensor,
        scale: float,
        softcap: float | None,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each row, 0 where the target is `ignore_index`, NaN where it is no class; and stats."""
        form = scale, softcap, ignore_index, smoothing
        loss_N, largest_N, total_N = self.rows.softmax(logits_NV.contiguous(), target_N, *form)
        if z_loss:
            z_loss_N = z_loss * (largest_N + total_N.log()).square()
            loss_N += torch.where(target_N == ignore_index, 0.0, z_loss_N)
        return loss_N, torch.stack((largest_N, total_N))

    def backward(
        self,
        logits_NV: torch.Tensor,
        target_N: torch.Tensor,
        weight_N: torch.Tensor,
        stats_2N: torch.Tensor,
        scale: float,
        softcap: float | None,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
    ) -> torch.Tensor:
        """Return the gradient of sum(weight * loss) with respect to this rank's logits, in their dtype; 0 in an ignored row."""
        grad_NV = logits_NV.clone(memory_format=torch.contiguous_format)
        largest_N, total_N = stats_2N
        if z_loss:
            total_N = total_N / (1.0 + 2.0 * z_loss * (largest_N + total_N.log()))
        weight_N = torch.where(self.rows.is_class(target_N), weight_N, torch.nan)
        where = self.rows.start, self.rows.vocab
        self.rows.module.shard_backward(
            grad_NV, target_N, weight_N, largest_N, total_N, *where, scale, softcap, ignore_index, smoothing
        )
        return grad_NV
