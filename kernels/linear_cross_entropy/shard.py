"""A vocabulary that is cut over ranks: each holds some rows of the head, computes their logits, and the ranks share one softmax.

Of each row of a chunk, a rank knows the largest of its logits m_r, the sum t_r of the exponentials above it, the target's logit if
that is its own, and with label smoothing the sum d_r of its logits' distances to m_r. One all-gather of these numbers gives all
ranks all of them, and with m = max over r of m_r the same

    total = sum over r of t_r exp(m_r - m)        lse = m + log(total)        sum over V of (z - m) = sum over r of d_r + n_r (m_r - m)

One collective and no all-reduce: a sum over ranks needs m first, and would be a second one. A rank may hold no row at all.
Its 5 numbers a token are 20 bytes, where the token's logits take 2 V. Source: Shoeybi et al., "Megatron-LM", 2019.
Letters: W ranks, C tokens of a chunk, V this rank's classes.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class VocabShard:
    """One rank's rows of the vocabulary; the rows of all ranks of the group, in their order, are the whole of it.

    Attributes:
        group: The process group of the ranks.
        start, stop: This rank's rows; there may be none.
        vocab: Length of the whole vocabulary.
    """

    group: Any
    start: int
    stop: int
    vocab: int


def named_group(name: str) -> Any:
    """The process group of that `group_name`, by which a registered operation knows it."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


@dataclass(frozen=True, slots=True)
class Sharded:
    """What an implementation does with a chunk of all logits, done with this rank's, in the same two functions.

    Attributes:
        module: The implementation.
        group: The process group of the ranks.
        start: This rank's first class.
        vocab: Length of the whole vocabulary.
    """

    module: ModuleType
    group: Any
    start: int
    vocab: int

    def forward(
        self,
        logits_CV: torch.Tensor,
        target_C: torch.Tensor,
        scale: float,
        softcap: float | None,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
    ) -> torch.Tensor:
        """Return the loss of each row, 0 where the target is `ignore_index`, NaN where it is no class."""
        loss_C, largest_C, total_C = self.softmax(logits_CV, target_C, scale, softcap, ignore_index, smoothing)
        return with_z_loss(loss_C, target_C, largest_C, total_C, ignore_index, z_loss)

    def backward(
        self,
        logits_CV: torch.Tensor,
        target_C: torch.Tensor,
        weight_C: torch.Tensor,
        scale: float,
        softcap: float | None,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
    ) -> torch.Tensor:
        """Return what `forward` does, and overwrite the logits with the gradient of sum(weight * loss) with respect to them."""
        options = scale, softcap, ignore_index, smoothing
        loss_C, largest_C, total_C = self.softmax(logits_CV, target_C, *options)
        loss_C = with_z_loss(loss_C, target_C, largest_C, total_C, ignore_index, z_loss)
        if z_loss:  # dividing by less, the exponentials become (1 + 2 c lse) times the probabilities
            total_C = total_C / (1.0 + 2.0 * z_loss * (largest_C + total_C.log()))
        weight_C = torch.where(self.is_class(target_C), weight_C, torch.nan)
        self.module.shard_backward(logits_CV, target_C, weight_C, largest_C, total_C, self.start, self.vocab, *options)
        return loss_C

    def softmax(
        self,
        logits_CV: torch.Tensor,
        target_C: torch.Tensor,
        scale: float,
        softcap: float | None,
        ignore_index: int,
        smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, largest logit and sum of the exponentials above it, of each row and of the whole vocabulary."""
        parts_4C = self.module.shard_forward(logits_CV, target_C, self.start, scale, softcap, ignore_index, smoothing)
        columns_1C = parts_4C.new_full((1, parts_4C.shape[1]), logits_CV.shape[1])
        parts_W5C = self._gathered(torch.cat((parts_4C, columns_1C)))
        largest_WC, total_WC, target_WC, distance_WC, columns_WC = parts_W5C.unbind(1)
        largest_C = largest_WC.amax(0)
        below_WC = largest_WC - largest_C
        total_C = (total_WC * below_WC.exp()).sum(0)
        loss_C = total_C.log() - (1.0 - smoothing) * (target_WC.sum(0) - largest_C)
        if smoothing:
            distance_WC = torch.where(columns_WC > 0, distance_WC + columns_WC * below_WC, 0.0)
            loss_C -= smoothing / self.vocab * distance_WC.sum(0)
        loss_C = torch.where(self.is_class(target_C), loss_C, torch.nan)
        return loss_C.masked_fill_(target_C == ignore_index, 0.0), largest_C, total_C

    def _gathered(self, parts_5C: torch.Tensor) -> torch.Tensor:
        parts_W5C = parts_5C.new_empty((dist.get_world_size(self.group), *parts_5C.shape))
        dist.all_gather(list(parts_W5C.unbind()), parts_5C, group=self.group)
        return parts_W5C

    def is_class(self, target_C: torch.Tensor) -> torch.Tensor:
        """Whether each target is a class of the whole vocabulary."""
        return (target_C >= 0) & (target_C < self.vocab)


def with_z_loss(
    loss_C: torch.Tensor,
    target_C: torch.Tensor,
    largest_C: torch.Tensor,
    total_C: torch.Tensor,
    ignore_index: int,
    z_loss: float,
) -> torch.Tensor:
    """The loss of each row with z_loss * lse^2 added where the target counts."""
    if not z_loss:
        return loss_C
    squares_C = (largest_C + total_C.log()).square()
    return loss_C + z_loss * squares_C.masked_fill_(target_C == ignore_index, 0.0)
