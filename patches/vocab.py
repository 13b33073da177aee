"""A head that is cut along the vocabulary over tensor-parallel ranks: whole logits of it, where somebody looks at them.

Whoever cuts a head says so on its linear, and on the `lora_B` linears of an adapter around it, by the attribute
`_tensor_parallel_vocab`. While such a linear is called its weight and bias are this rank's rows, as plain tensors; between its
calls they may be DTensors. What it is given is the same on all ranks, and goes through `copy_to` here: what comes before it, an
adapter's `lora_A` as well, has whole gradients. A lazy head is also called for the loss: with a second argument, and an answer
that is no logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.collectives import copy_to, gather_from, part_sizes, size_of
from automodel_accel.kernels.linear_cross_entropy.shard import VocabShard

__all__ = ["VOCAB_SHARD", "VocabShard", "own_rows", "parallel_logits", "prefix", "vocab_length", "vocab_shard"]

VOCAB_SHARD = "_tensor_parallel_vocab"


def vocab_shard(module: nn.Module) -> VocabShard | None:
    """Which rows of the vocabulary this rank's linear holds, or None where it holds all."""
    return getattr(module, VOCAB_SHARD, None)


def vocab_length(linear: nn.Module) -> int:
    """Length of the whole vocabulary that a head's linear gives logits of."""
    shard = vocab_shard(linear)
    length: Any = linear.out_features if shard is None else shard.vocab
    return int(length)


def prefix(shard: VocabShard, vocab: int) -> VocabShard:
    """The same of the first `vocab` classes only."""
    return VocabShard(shard.group, min(shard.start, vocab), min(shard.stop, vocab), vocab)


def own_rows(parameter: torch.Tensor, linear: nn.Module | None, shard: VocabShard | None) -> torch.Tensor:
    """This rank's rows of a parameter with one row a class, as a plain tensor that gradients go through.

    Args:
        parameter: Of `linear`, plain or a DTensor; where `linear` is not cut, or None, it is whole, and its gradient will be.
        linear: The module that it belongs to, if any.
        shard: This rank's rows; None for all.
    """
    if shard is None:
        return parameter
    if linear is None or vocab_shard(linear) is None:
        return copy_to(parameter, shard.group)[shard.start : shard.stop]
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def parallel_logits(original: Callable[..., torch.Tensor], module: Any, input: torch.Tensor) -> torch.Tensor:
    """The logits of the whole vocabulary, on all ranks.

    Args:
        original: The linear's own forward, (module, input) -> [..., its rows].
        module: The linear; where it has no `vocab_shard`, this is its own forward.
        input: [..., H], the same on all ranks.

    Returns:
        [..., V]. The gradient of `input` is whole on each rank, those of weight and bias are of this rank's rows.
    """
    shard = vocab_shard(module)
    if shard is None:
        return original(module, input)
    sizes = part_sizes(shard.vocab, size_of(shard.group))
    return gather_from(original(module, copy_to(input, shard.group)), shard.group, -1, sizes)
