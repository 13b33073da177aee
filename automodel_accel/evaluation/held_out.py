"""The loss on data that a model was not trained on."""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from automodel_accel.parallel.mesh import Ranks
from automodel_accel.parallel.tokens import label_tokens
from automodel_accel.patches.loss import loss_only


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What was measured, over all ranks.

    Attributes:
        loss: Mean over the label tokens, in nats.
        label_tokens: Their number.
    """

    loss: float
    label_tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where that is too large a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def takes_num_items(model: Any) -> bool:
    """Whether the model's loss is the sum over its tokens divided by `num_items_in_batch`; as transformers' Trainer asks."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    said = getattr(inner, "accepts_loss_kwargs", None)
    if said is not None:
        return bool(said)
    return any(one.kind is one.VAR_KEYWORD for one in inspect.signature(inner.forward).parameters.values())


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, ranks: Ranks | None = None) -> HeldOut:
    """The mean loss over all label tokens of the batches; on all ranks. Where the loss is swapped no logits are built.

    Args:
        model: As it trains; in eval mode meanwhile.
        batches: Of this rank, with labels; every rank has as many.
        ranks: How the processes are laid out.

    Raises:
        ValueError: no token of them has a label.
    """
    device = next(model.parameters()).device
    one = torch.ones((), device=device)
    sums_itself = takes_num_items(model)
    found = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with loss_only(model):
            for batch in batches:
                inputs = {
                    name: value.to(device) if isinstance(value, torch.Tensor) else value
                    for name, value in batch.items()
                }
                count = label_tokens(inputs)
                if sums_itself:
                    loss = model(**inputs, num_items_in_batch=one).loss
                else:
                    loss = torch.where(count > 0, model(**inputs).loss * count, 0.0)
                found += torch.stack([loss.detach(), count]).to(found)
    finally:
        model.train(was_training)
    if ranks is not None and ranks.tokens_group is not None:
        dist.all_reduce(found, group=ranks.tokens_group)
        found[1] /= ranks.mesh.context  # whose ranks count whole rows, and compute parts of them
    total, count = found.tolist()
    if not count:
        raise ValueError("no token of the held-out data has a label; expected at least one.")
    return HeldOut(total / count, round(count))
