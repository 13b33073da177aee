"""Embedding and output head, cut along the vocabulary over the tensor ranks.

The embedding looks its own rows up, and the ranks sum; the head gives logits of its own rows, of which the loss needs a few
numbers a token from each rank (kernels/linear_cross_entropy/shard.py), and which are gathered where somebody looks at them.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from automodel_accel.kernels.collectives import part_sizes, sum_from
from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.linear_cross_entropy.shard import VocabShard
from automodel_accel.parallel.tensor_local import WHOLE, Held, held
from automodel_accel.patches.heads import linears_of, named_head
from automodel_accel.patches.loss import LAZY
from automodel_accel.patches.retype import original_class, owner_of, retype
from automodel_accel.patches.vocab import VOCAB_SHARD, parallel_logits

STAYS = "embedding and head are whole on each rank"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is cut along the vocabulary.

    Attributes:
        embedding: The input embedding, if it is.
        linears: Of the output head: its own, and the last ones of adapters around it.
        words: Length of the vocabulary.
    """

    embedding: nn.Embedding | None
    linears: Sequence[nn.Linear]
    words: int

    def cuts(self) -> dict[nn.Parameter, Placement]:
        """Parameter -> how it is cut."""
        modules: list[Any] = [*self.linears, *([self.embedding] if self.embedding is not None else [])]
        return {p: Shard(0) for module in modules for p in module._parameters.values() if p is not None}

    def modules(self) -> list[nn.Module]:
        """All of them."""
        return [*self.linears, *([self.embedding] if self.embedding is not None else [])]


def vocabulary_of(base: Any, size: int) -> Vocabulary | Refusal | None:
    """What can be cut; or why it is not. A weight that both share is cut for both, or for none."""
    embedding, head = _embedding(base), named_head(base)
    linears = linears_of(head) if isinstance(head, nn.Module) else []
    plain = [linear for linear in linears if original_class(linear) is nn.Linear]
    cuttable_head = bool(linears) and len(plain) == len(linears)
    cuttable_embedding = isinstance(embedding, nn.Embedding) and embedding.max_norm is None
    if not cuttable_head and not cuttable_embedding:
        return Refusal("the vocabulary", "neither embedding nor head is one that is cut", STAYS) if head else None
    found_embedding: Any = embedding if cuttable_embedding else None
    found_linears: list[Any] = plain if cuttable_head else []
    tied = bool(linears) and getattr(embedding, "weight", 0) is getattr(linears[0], "weight", 1)
    if tied and not (cuttable_head and cuttable_embedding):
        return Refusal(
            "the vocabulary", "one of embedding and head, which share their weight, is none that is cut", STAYS
        )
    weights_of = [found_embedding.weight] * (found_embedding is not None) + [linear.weight for linear in found_linears]
    if _is_used_elsewhere(
        base, weights_of, [*found_linears, *([found_embedding] if found_embedding is not None else [])]
    ):
        return Refusal("the vocabulary", "the weight of the embedding or the head is used by other modules too", STAYS)
    lengths = {weight.shape[0] for weight in weights_of}
    if len(lengths) > 1 or not all(part_sizes(length, size)[-1] for length in lengths):
        return Refusal(
            "the vocabulary", f"it has {sorted(lengths)} words, of which {size} ranks cannot have some each", STAYS
        )
    return Vocabulary(found_embedding, found_linears, lengths.pop())


def serve(vocabulary: Vocabulary, group: Any, rank: int, size: int) -> None:
    """Re-type embedding and head."""
    sizes = part_sizes(vocabulary.words, size)
    shard = VocabShard(group, sum(sizes[:rank]), sum(sizes[: rank + 1]), vocabulary.words)
    for linear in vocabulary.linears:
        setattr(linear, VOCAB_SHARD, shard)
        _serve_linear(linear, group, rank)
    if vocabulary.embedding is not None:
        _serve_embedding(vocabulary.embedding, shard, rank)


def _serve_linear(linear: nn.Linear, group: Any, rank: int) -> None:
    is_lazy = getattr(type(linear), LAZY, False)
    original = type(linear).forward
    parameters = [Held(linear, name, WHOLE) for name, p in linear._parameters.items() if p is not None]

    @functools.wraps(original)
    def forward(self: nn.Linear, *args: Any, **kwargs: Any) -> Any:
        with held([Held(self, one.name, WHOLE) for one in parameters], group, rank):
            # a lazy head asks parallel_logits itself, where it is asked for logits at all
            return original(self, *args, **kwargs) if is_lazy else parallel_logits(original, self, *args, **kwargs)

    retype(linear, {"forward": forward}, owner_of(linear))


def _serve_embedding(embedding: nn.Embedding, shard: VocabShard, rank: int) -> None:
    original = type(embedding).forward

    @functools.wraps(original)
    def forward(self: nn.Embedding, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        elsewhere = (input < shard.start) | (input >= shard.stop)
        padding = self.padding_idx
        own = padding is not None and shard.start <= padding < shard.stop
        self.padding_idx = padding - shard.start if own else None  # type: ignore[operator]
        try:
            with held([Held(self, "weight", WHOLE)], shard.group, rank):
                found = original(self, (input - shard.start).masked_fill(elsewhere, 0), *args, **kwargs)
        finally:
            self.padding_idx = padding
        return sum_from(found.masked_fill(elsewhere[..., None], 0.0), shard.group)

    retype(embedding, {"forward": forward}, owner_of(embedding))


def _embedding(base: Any) -> Any:
    if not hasattr(type(base), "get_input_embeddings"):
        return None
    try:
        return base.get_input_embeddings()
    except NotImplementedError:  # a composite model may not say which of its embeddings it is
        return None


def _is_used_elsewhere(base: nn.Module, weights: Sequence[Any], own: Sequence[nn.Module]) -> bool:
    ids, modules = {id(weight) for weight in weights}, {id(module) for module in own}
    return any(
        id(parameter) in ids and id(module) not in modules
        for module in base.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
