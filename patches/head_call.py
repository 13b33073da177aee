"""One call of the output head whose logits were not built: what it takes to build them, or to compute their loss.

The head may be a sum: a LoRA'd head adds to its own product one low-rank product per adapter, and a model may add a vector
of its own to the logits. A `HeadCall` stands for

    linear(hidden) + factor * lora_b(lora_a(hidden)) + ... + row                    [..., V]

where what each linear was given is kept by the `LazyLogits` that belong to the call, and `Recipe` says what came after the sum.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from automodel_accel.patches.contract import Counts, Proven
from automodel_accel.patches.vocab import own_rows, vocab_shard


@dataclass(frozen=True, slots=True)
class Recipe:
    """What was recorded between the head and the loss: dtype( after * tanh(scale * logits[..., :vocab]) ).

    Attributes:
        dtype: Dtype that the logits have by now.
        computed_in: Dtype in which the head multiplies: autocast's where the head was called in its region.
        vocab: Length of the prefix of the vocabulary that is left.
        scale, tanh, after: As above; without tanh: dtype( scale * logits ).
        summed_in: Dtype of the sum. The loss rounds it to `computed_in`, so it waits until it is cast to that.
    """

    dtype: torch.dtype
    computed_in: torch.dtype
    vocab: int
    scale: float = 1.0
    tanh: bool = False
    after: float = 1.0
    summed_in: torch.dtype | None = None

    @property
    def is_rounded(self) -> bool:
        """Whether the sum has the dtype in which the head multiplies."""
        return self.summed_in in (None, self.computed_in)


def apply_recipe(logits: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """What was recorded, done to real logits [..., V]."""
    if recipe.vocab != logits.shape[-1]:
        logits = logits[..., : recipe.vocab]
    if recipe.scale != 1.0:
        logits = logits * recipe.scale
    if recipe.tanh:
        logits = torch.tanh(logits) * recipe.after
    return logits.to(recipe.dtype)


@dataclass(frozen=True, slots=True)
class Summand:
    """One linear of a head, the dtype in which it multiplies, and the number that its product is multiplied by."""

    linear: Any
    computed_in: torch.dtype
    factor: float = 1.0

    @property
    def is_whole(self) -> bool:
        """Whether the weight is here to be read, or all rows of it that are this rank's: not FSDP2's shard, not offloaded."""
        weight, shard = self.linear.weight, vocab_shard(self.linear)
        if shard is not None:
            return bool(own_rows(weight, self.linear, shard).shape[0] == shard.stop - shard.start)
        return type(weight) in (nn.Parameter, torch.Tensor) and weight.numel() > 0


@dataclass(frozen=True, slots=True)
class LossRequest:
    """What the head is asked to compute in place of logits: arguments of `F.cross_entropy`, and what the logits are.

    Attributes:
        recipe: What came after the sum.
        z_loss: Factor of lse^2, which is added to the loss of each token that counts.
        low_rank: The summands beside the head's own product, each with what its linear was given.
        row: [V], added by the model.
    """

    recipe: Recipe
    target: torch.Tensor
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float = 0.0
    low_rank: tuple[tuple[Summand, torch.Tensor], ...] = ()
    row: torch.Tensor | None = None


class _Materialise:
    """Asks a linear for its real product."""


MATERIALISE = _Materialise()


@dataclass(slots=True)
class HeadCall:
    """One call of the head, shared by the logits that stand for it and all that were made of them.

    Attributes:
        summands: The head's own linear first.
        counts: Where calls are counted.
        proven: The kinds of call whose loss is proved.
        autocast: Whether the head was called in autocast's region.
        row: [V], added by the model.
        loss_taken: Whether a loss was computed without logits.
        versions: (tensor, its version when it was used).
    """

    summands: tuple[Summand, ...]
    counts: Counts
    proven: Proven
    autocast: bool
    row: torch.Tensor | None = None
    loss_taken: bool = False
    versions: list[tuple[Any, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.note_versions()

    def note_versions(self) -> None:
        """Note what the head is made of; again outside of its call, where weights that are plain only inside are DTensors."""
        if not torch.compiler.is_compiling():
            self.versions.extend((tensor, tensor._version) for tensor in self._made_of())

    def _made_of(self) -> list[torch.Tensor]:
        return [summand.linear.weight for summand in self.summands] + ([] if self.row is None else [self.row])

    def plus(self, summand: Summand, device: torch.device) -> "HeadCall | None":
        """The call with one product more, or None where the loss of such a sum is not proved."""
        summands = (*self.summands, summand)
        kind = (device.type, summands[0].computed_in, widest(summands))
        return replace(self, summands=summands) if kind in self.proven else None

    def plus_row(self, row: torch.Tensor) -> "HeadCall":
        """The call with one vector more on each row of logits."""
        return replace(self, row=row if self.row is None else self.row + row)

    def logits(self, hiddens: Sequence[torch.Tensor], recipe: Recipe, why: str) -> torch.Tensor:
        """The real logits, with their autograd graph; `why` is counted."""
        self.counts.count(self.counts.materialised, why)
        now = self._made_of()
        if any(tensor is used and used._version != was for tensor in now for used, was in self.versions):
            raise RuntimeError(
                f"logits of a training step are built when they are read ({why}), but the output head has changed since that "
                "step; read outputs.logits before optimizer.step(), or keep them always with apply(model, loss=False)."
            )
        with self._as_called(hiddens[0].device.type):
            total: torch.Tensor = call_head(self.summands[0].linear, hiddens[0], MATERIALISE)
            for summand, hidden in zip(self.summands[1:], hiddens[1:], strict=True):
                total = total + call_head(summand.linear, hidden, MATERIALISE) * summand.factor
            if self.row is not None:
                total = total + self.row
        return apply_recipe(total if recipe.summed_in is None else total.to(recipe.summed_in), recipe)

    def _as_called(self, device: str) -> AbstractContextManager[object]:
        """Autocast as it was when the head was called: logits may be read outside of its region."""
        if torch.is_autocast_enabled(device) == self.autocast:
            return nullcontext()
        dtype = self.summands[0].computed_in if self.autocast else None
        return torch.autocast(device, dtype=dtype, enabled=self.autocast)


def widest(summands: Sequence[Summand]) -> torch.dtype:
    """The dtype that holds what each summand is computed in."""
    dtype = summands[0].computed_in
    for summand in summands:
        dtype = torch.promote_types(dtype, summand.computed_in)
    return dtype


def call_head(linear: nn.Module, hidden: torch.Tensor, request: LossRequest | _Materialise) -> Any:
    """Ask a linear. Through `__call__`, whose hooks gather the weight, only when the weight is not whole here: calling a module
    of a grouped FSDP2 unit twice breaks the group's bookkeeping."""
    weight: Any = linear.weight
    whole = type(weight) in (nn.Parameter, torch.Tensor) and weight.numel() > 0 and weight.device == hidden.device
    return linear.forward(hidden, request) if whole else linear(hidden, request)
