"""Losses beside the plain cross entropy: label smoothing and z-loss, through transformers' own place for a loss function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from automodel_accel.patches.lazy_logits import IGNORED, cross_entropy
from automodel_accel.patches.rebind import named_in


@dataclass(frozen=True, slots=True)
class CausalLoss:
    """transformers' loss of causal language models, with label smoothing and z-loss where gradients are recorded.

    Attributes:
        label_smoothing, z_loss: See `set_loss`.
    """

    label_smoothing: float
    z_loss: float

    def __call__(
        self,
        logits: Any,
        labels: Any,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED,
        shift_labels: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """As `transformers.loss.loss_utils.ForCausalLMLoss` is called."""
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        smoothing, z_loss = (self.label_smoothing, self.z_loss) if torch.is_grad_enabled() else (0.0, 0.0)
        found = cross_entropy(
            logits.float().view(-1, vocab_size),
            shift_labels.reshape(-1).to(logits.device),
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            label_smoothing=smoothing,
            z_loss=z_loss,
        )
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(found.device)
        return found if num_items_in_batch is None else found / num_items_in_batch


def set_loss(model: nn.Module, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Callable[[], None]:
    """Give a causal or image-text-to-text model a loss with label smoothing and z-loss.

    Where its head is swapped the loss is still computed without logits. Without gradients it stays the plain cross entropy,
    so that losses on held-out data can be compared, and are the logarithm of a perplexity.

    Args:
        model: Of transformers, or PEFT's around one; applied and spread or not.
        label_smoothing: Share of the target that is spread evenly over the vocabulary, from 0 to 1.
        z_loss: Factor on the squared logarithm of the softmax's sum (Chowdhery et al., "PaLM", 2022, section 5).

    Returns:
        What takes it back.

    Raises:
        ValueError: a number is out of range, or the model computes its loss in another way.
    """
    if not 0 <= label_smoothing <= 1 or not z_loss >= 0:
        raise ValueError(
            f"label_smoothing is {label_smoothing} and z_loss {z_loss}; expected a share between 0 and 1, and 0 or more."
        )
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    _check(inner)
    before = vars(inner).get("_loss_function")
    inner.loss_function = CausalLoss(label_smoothing, z_loss)

    def take_back() -> None:
        if before is None:
            del inner._loss_function
        else:
            inner.loss_function = before

    return take_back


def _check(inner: Any) -> None:
    """Whether what is set as the loss function is called, for what `ForCausalLMLoss` computes."""
    name, instead = type(inner).__name__, "leave label_smoothing and z_loss at 0."
    if not hasattr(type(inner), "loss_function") or "loss_function" not in named_in(type(inner).forward):
        raise ValueError(
            f"{name} computes its loss without loss_function, through which transformers takes one; {instead}"
        )
    if inner.loss_function is not ForCausalLMLoss and not isinstance(inner.loss_function, CausalLoss):
        found = getattr(inner.loss_function, "__name__", type(inner.loss_function).__name__)
        raise ValueError(f"the loss of {name} is {found}, expected transformers' ForCausalLMLoss; {instead}")
