"""Tensor parallel: the products of a layer are cut over the ranks of the `tensor` axis, which all see the same rows.

Attention is cut by heads, an MLP and experts by what lies between their products, embedding and head by the vocabulary. What
cannot be cut is computed whole on each rank, and said so.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from automodel_accel.kernels.contract import Refusal
from automodel_accel.parallel import tensor_sequence, tensor_vocab
from automodel_accel.parallel.mesh import Ranks
from automodel_accel.parallel.tensor_local import SHARE, WHOLE, Held, put_at_rest, serve_unit, serve_whole
from automodel_accel.parallel.tensor_proof import disprove, reads_elsewhere
from automodel_accel.parallel.tensor_units import STAYS, Unit, left_whole, units_of
from automodel_accel.parallel.tensor_vocab import Vocabulary, vocabulary_of
from automodel_accel.parallel.wrap import device_of, layers_of, root_of
from automodel_accel.parallel.wrap import units_of as gathered_units


def cut(model: nn.Module, ranks: Ranks) -> list[Refusal]:
    """Cut `model`, in place, after `apply` and before FSDP2; all ranks hold the same values.

    At rest each parameter is a DTensor on the tensor axis then, cut or whole.

    Returns:
        What is not cut, and why.

    Raises:
        ValueError: heads that the ranks do not divide, weights that cannot be cut, or nothing to cut; nothing was changed.
    """
    assert ranks.device_mesh is not None
    size, rank, group = ranks.mesh.tensor, ranks.rank_of("tensor"), ranks.group("tensor")
    base: Any = model.get_base_model() if hasattr(type(model), "get_base_model") else model  # type: ignore[operator]
    units, refusals = _units(model, base, size)
    vocabulary = _vocabulary(model, base, size)
    if isinstance(vocabulary, Refusal):
        refusals, vocabulary = [*refusals, vocabulary], None
    layers, split = layers_of(model), ranks.mesh.sequence_parallel
    if split:
        layers = _span(layers, units)
        tensor_sequence.check(base, layers, units)
    cuts = {parameter: placement for unit in units for parameter, placement in unit.cuts.items()}
    inside = [(unit, unit.held()) for unit in units]
    gathered = {unit.module for unit in gathered_units(model)} if ranks.mesh.wrapping == "fsdp2" else set()
    outside = list(_outside(model, units, vocabulary, gathered))
    _draw_alike(group, device_of(ranks.device_mesh))
    put_at_rest(model, ranks.device_mesh["tensor"], cuts | (vocabulary.cuts() if vocabulary is not None else {}))
    for unit, parameters in inside:
        serve_unit(unit.module, parameters, tensor_sequence.passage_of(unit, group, split), rank)
    if split:
        tensor_sequence.serve(layers, group)
    for module, parameters in outside:
        sees_a_part = split and module in layers
        serve_whole(
            module, [replace(one, serves=SHARE) for one in parameters] if sees_a_part else parameters, group, rank
        )
    if vocabulary is not None:
        tensor_vocab.serve(vocabulary, group, rank, size)
    return refusals


def _span(layers: list[nn.Module], units: list[Unit]) -> list[nn.Module]:
    """From the first layer with a unit to the last one."""
    cut = {unit.module for unit in units}
    numbers = [number for number, layer in enumerate(layers) if cut & set(layer.modules())]
    return layers[numbers[0] : numbers[-1] + 1] if numbers else []


def _units(model: nn.Module, base: nn.Module, size: int) -> tuple[list[Unit], list[Refusal]]:
    """What is cut, each of it proved where the weights are here; and why the rest is not."""
    units, refusals = units_of(model, size)
    if _is_here(model):
        reasons = disprove(base, units, size)
        refusals += [Refusal(path, reason, STAYS) for path, reason in reasons.items()]
        units = [unit for unit in units if unit.path not in reasons]
    if not units:
        raise ValueError(
            f"Mesh: tensor is {size}, but nothing in this {type(model).__name__} can be cut: "
            f"{'; '.join(map(str, refusals)) or 'transformers has no plan for it'}. Use Mesh(tensor=1)."
        )
    return units, [*refusals, *left_whole(model, units, refusals, layers_of(model))]


def _vocabulary(model: nn.Module, base: Any, size: int) -> Vocabulary | Refusal | None:
    found = vocabulary_of(base, size)
    if not isinstance(found, Vocabulary) or found.embedding is None or not _is_here(model):
        return found
    if reads_elsewhere(base, found.embedding.weight, found.modules()):
        return Refusal("the vocabulary", "the model reads its embedding without calling it", tensor_vocab.STAYS)
    return found


def _is_here(model: nn.Module) -> bool:
    return not any(parameter.is_meta for parameter in model.parameters())


def _draw_alike(group: Any, device: torch.device) -> None:
    """Give the ranks the random numbers of the first: what lies between units, dropout as well, is the same on all of them."""
    modules = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    for module in modules:
        state = module.get_rng_state().to(device)
        dist.broadcast(state, group=group, group_src=0)
        module.set_rng_state(state.cpu())


def _outside(
    model: nn.Module, units: list[Unit], vocabulary: Vocabulary | None, gathered: set[nn.Module]
) -> Iterator[tuple[nn.Module, list[Held]]]:
    """Modules that compute the same on all ranks, and what they hold: each layer with all of it, and what lies in no layer.

    The whole model holds the latter as well, for there are modules that read each other's; but what FSDP2 will have gathered by then.
    """
    inside = {module for unit in units for module in unit.module.modules()}
    if vocabulary is not None:
        inside.update(vocabulary.modules())
    for layer in layers_of(model):
        if held := [one for module in layer.modules() if module not in inside for one in _own(module)]:
            yield layer, held
        inside.update(layer.modules())
    rest = {module: held for module in model.modules() if module not in inside and (held := list(_own(module)))}
    yield from rest.items()
    elsewhere = {module for unit in gathered for module in unit.modules()}
    yield root_of(model), [one for module, held in rest.items() if module not in elsewhere for one in held]


def _own(module: nn.Module) -> Iterator[Held]:
    return (Held(module, name, WHOLE) for name, parameter in module._parameters.items() if parameter is not None)
