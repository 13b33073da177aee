"""`cross_entropy` by the Triton kernels of Transformer Engine, through the plain functions of its `parallel_cross_entropy`.

Its backward writes the gradient over the logits, which a model may read again. Here it works on a copy, which becomes the
gradient: 2 passes over [N, V] more than the floor. A target out of range has an infinite loss. Where the vocabulary is cut over
ranks these share one all-gather of 16 bytes a row, and have equally many classes each. Shapes as in eager.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformer_engine.pytorch.triton.cross_entropy import cross_entropy_backward, cross_entropy_forward

READ_ONLY = True  # "overwrite_input" makes no copy of the logits, and the forward does not write to them
REDUCED = False  # a loss for each row


@dataclass(frozen=True, slots=True)
class Rows:
    """Whole rows of logits; with a process group, each of its ranks has as many classes of them, in the order of the ranks."""

    group: Any = None

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
        """Return the loss of each row, 0 where the target is `ignore_index`, and stats; both in float32."""
        if logits_NV.numel() == 0:
            loss_N = logits_NV.new_zeros(logits_NV.shape[0], dtype=torch.float32)
            return loss_N, logits_NV.new_zeros((2, logits_NV.shape[0]), dtype=torch.float32)
        given = logits_NV[None], target_N, smoothing, REDUCED, self.group, ignore_index, READ_ONLY
        loss_1N, _, stats_N2, *_ = cross_entropy_forward(*given)
        return loss_1N[0], stats_N2.t().contiguous()

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
        """Return the gradient of sum(weight * loss) with respect to the logits, in their dtype; exactly 0 in an ignored row."""
        grad_NV = logits_NV.clone(memory_format=torch.contiguous_format)
        if logits_NV.numel() == 0:
            return grad_NV
        stats_N2 = stats_2N.t().contiguous()
        rank, ranks = (0, 1) if self.group is None else (dist.get_rank(self.group), dist.get_world_size(self.group))
        options = smoothing, REDUCED, rank, ranks, ignore_index
        cross_entropy_backward(grad_NV[None], stats_N2, target_N.contiguous(), None, weight_N, *options)
        return grad_NV


forward, backward = Rows().forward, Rows().backward


def sharded(group: Any, start: int, vocab: int) -> Rows:
    """The same two functions where this rank has `vocab` over the number of ranks of the classes, from `start` on."""
    return Rows(group)
