"""Losses beside the plain cross entropy: label smoothing and z-loss, through transformers' own place for a loss function."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100


def set_loss(model: nn.Module, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Callable[[], None]:
    """Give a causal or image-text-to-text model a loss with label smoothing and z-loss.

    With label smoothing alone the loss is still computed without logits. z-loss reads all logits, which are built then.

    Args:
        model: Of transformers, or PEFT's around one; applied and spread or not.
        label_smoothing: Share of the target that is spread evenly over the vocabulary.
        z_loss: Factor on the squared logarithm of the softmax's sum (Chowdhery et al., "PaLM", 2022, section 5).

    Returns:
        What takes it back.

    Raises:
        ValueError: the model has no place for a loss function.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not hasattr(type(inner), "loss_function"):
        raise ValueError(
            f"{type(inner).__name__} has no loss_function, through which transformers takes a loss; leave label_smoothing and z_loss at 0."
        )
    before = vars(inner).get("_loss_function")

    def loss(logits: Any, labels: Any, vocab_size: int, num_items_in_batch: Any = None, **kwargs: Any) -> torch.Tensor:
        shifted = kwargs.get("shift_labels")
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()
        target = shifted.view(-1).to(logits.device)
        logits = logits.float().view(-1, vocab_size)
        reduction = "mean" if num_items_in_batch is None else "sum"
        found = F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)
        if z_loss:
            squares = torch.where(target != IGNORED, torch.logsumexp(logits, -1).square(), 0.0).sum()
            found = found + z_loss * (squares / (target != IGNORED).sum() if num_items_in_batch is None else squares)
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(found.device)
        return found if num_items_in_batch is None else found / num_items_in_batch

    inner.loss_function = loss

    def take_back() -> None:
        if before is None:
            del inner._loss_function
        else:
            inner.loss_function = before

    return take_back
