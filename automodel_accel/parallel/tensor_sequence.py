"""Sequence parallel: between the units of tensor parallel, each rank holds a part of the tokens.

The first layer's input is split along the tokens, and the last one's output gathered; norms, residual sums and dropout in between see
this rank's tokens only, which spares their memory. A unit gathers its input, and scatters the sum of its outputs: together as much
traffic as the one all-reduce that they replace. Source: Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models", 2022, section 4.2.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from automodel_accel.kernels.collectives import copy_to, gather_from, gather_to, size_of, split_to, sum_split_from
from automodel_accel.parallel.tensor_local import Copied
from automodel_accel.parallel.tensor_sequence_proof import HIDDEN, first_input, mixing_layer, token_dim
from automodel_accel.parallel.tensor_units import Unit, is_attention
from automodel_accel.patches.retype import owner_of, retype


class Split(Copied):
    """How tensors pass into a unit and out of it where each rank holds a part of the tokens between units.

    Args:
        group: The tensor ranks.
        all_inputs: Whether every tensor that the unit is given has a row per token (experts: hidden states, indices, weights);
            else the first one has, [B, S, H] or [tokens, H], and the others are whole.
    """

    def __init__(self, group: Any, all_inputs: bool) -> None:
        super().__init__(group)
        self._all_inputs = all_inputs
        self._dim = 0

    def enter(self, args: Any, kwargs: Any) -> Any:
        """What a unit is given: all tokens, whose gradients are summed and split."""
        first = first_input(args, kwargs)
        self._dim = token_dim(first)

        def gathered(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if x is first or self._all_inputs:
                return gather_to(x, self.group, self._dim)
            return copy_to(x, self.group) if x.is_floating_point() else x

        return tree_map(gathered, (args, kwargs))

    def leave(self, share: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of the sum."""
        return sum_split_from(share, self.group, self._dim)


def passage_of(unit: Unit, group: Any, split: bool) -> Copied:
    """How tensors pass into a unit and out of it."""
    return Split(group, "" in unit.linears) if split else Copied(group)


def check(model: Any, layers: Sequence[nn.Module], units: Sequence[Unit]) -> None:
    """Whether tokens can be split from the first layer to the last one.

    Raises:
        ValueError: they cannot, and why.
    """
    name = type(model).__name__
    owners = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
    outside = [unit.path for unit in units if id(unit.module) not in owners]
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and any(layer in set(m) for layer in layers)]
    if outside or len(lists) != 1:
        raise ValueError(
            f"Mesh: sequence_parallel splits tokens over one stack of layers, but this {name} has {len(lists)}"
            f"{', and cuts ' + outside[0] + ' outside of it' if outside else ''}; leave sequence_parallel out."
        )
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            f"Mesh: sequence_parallel gives the router a part of the tokens, but this {name} has a loss over all of its logits "
            "(output_router_logits); leave one of them out."
        )
    if (mixing := _mixing(model, layers, units)) is not None:
        raise ValueError(
            f"Mesh: sequence_parallel gives what is not cut a part of the tokens, but in or after {mixing} of this {name} they see each "
            "other there; leave sequence_parallel out."
        )


def _mixing(model: Any, layers: Sequence[nn.Module], units: Sequence[Unit]) -> str | None:
    """Path of a layer in which tokens see each other outside of units."""
    paths = {module: path for path, module in model.named_modules()}
    if any(parameter.is_meta for parameter in model.parameters()):
        cut = {unit.module for unit in units}
        return next((paths[layer] for layer in layers if _may_mix(layer, cut)), None)
    found = mixing_layer(model, layers, [unit.module for unit in units])
    return None if found is None else paths[found]


def _may_mix(layer: nn.Module, cut: set[nn.Module]) -> bool:
    """Whether it has attention, or a matrix in a part of it, where nothing is cut; for layers that cannot be tried."""
    if any(is_attention(module) and module not in cut for module in layer.modules()):
        return True
    parts = [part for part in layer.children() if not cut & set(part.modules())]
    return any(parameter.dim() > 1 for part in parts for parameter in part.parameters())


def serve(layers: Sequence[nn.Module], group: Any) -> None:
    """Re-type the first and the last layer: tokens are split before the one and gathered after the other."""
    first, last = layers[0], layers[-1]
    retype(first, {"forward": _splitting(type(first).forward, group)}, owner_of(first))
    retype(last, {"forward": _gathering(type(last).forward, group)}, owner_of(last))


def _splitting(original: Callable[..., Any], group: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = first_input(args, kwargs)
        if hidden.shape[1] % size_of(group):
            raise ValueError(
                f"sequence_parallel: rows of {hidden.shape[1]} tokens cannot be split over {size_of(group)} ranks; pad them to a "
                f"multiple (pad_to_multiple_of={size_of(group)} of the collator)."
            )
        part = split_to(hidden, group, 1)
        args, kwargs = ((part, *args[1:]), kwargs) if args else (args, {**kwargs, HIDDEN: part})
        return original(self, *args, **kwargs)

    return forward


def _gathering(original: Callable[..., Any], group: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if isinstance(output, tuple):
            return (gather_from(output[0], group, 1), *output[1:])
        return gather_from(output, group, 1)

    return forward
