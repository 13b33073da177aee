"""A teacher, from whose probabilities a model learns beside the labels.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from automodel_accel.evaluation import takes_num_items
from automodel_accel.parallel.tokens import label_tokens
from automodel_accel.patches.divergence import divergence
from automodel_accel.patches.loss import loss_only

IGNORED = -100


class Teacher:
    """A frozen model and how much of the loss it gives.

    Args:
        model: Applied or plain, in eval mode; it is given the batches that the student is given.
        weight: Of the divergence; the labels' loss has one minus it.
        temperature: Divides the logits of both.
    """

    def __init__(self, model: nn.Module, weight: float, temperature: float) -> None:
        self.model = model.requires_grad_(False).eval()
        self.weight, self.temperature = weight, temperature

    def loss(self, student: nn.Module, batch: Mapping[str, Any], items: torch.Tensor) -> torch.Tensor:
        """(1 - weight) * the labels' loss + weight * the divergence, each a sum over the batch's label tokens divided by `items`.

        Args:
            student: The model that trains.
            batch: Its keyword arguments, with labels.
            items: 0-dimensional.

        Raises:
            ValueError: the vocabularies differ.
        """
        with torch.no_grad(), loss_only(self.model):
            said = self.model(**{**batch, "use_cache": False}).logits
        if takes_num_items(student):
            outputs = student(**batch, num_items_in_batch=items)
            own = outputs.loss
        else:
            outputs = student(**batch)
            own = outputs.loss * (label_tokens(batch) / items)
        apart = divergence(outputs.logits, said, label_mask(batch), self.temperature) / items
        total: torch.Tensor = (1 - self.weight) * own + self.weight * apart
        return total


def label_mask(batch: Mapping[str, Any]) -> torch.Tensor:
    """[rows, tokens], bool: whether what follows a token has a label."""
    shifted = batch.get("shift_labels")
    if shifted is None:
        shifted = F.pad(batch["labels"], (0, 1), value=IGNORED)[..., 1:]
    counted: torch.Tensor = shifted != IGNORED
    return counted
