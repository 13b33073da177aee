"""Shape of a model, read from its modules: on any device, meta included. Nothing is run."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from automodel_accel.flops import EXPERTS_OF_A_TOKEN
from automodel_accel.parallel.wrap import LAYER, layers_of, units_of
from automodel_accel.patches.heads import base_linear, output_head
from automodel_accel.scaling.shape import ROOT, Layer, Shape, Weight

COLUMN, ROW = 0, 1  # the dimension of a linear's weight that tensor ranks cut: its outputs, its inputs
TOWERS = "activations of towers for images and sound are not counted; their weights are"
RECURRENT = "activations of layers without attention (recurrent, linear attention) are not counted but for their MLP"
LATENT = "the projections to and from latents of queries and keys are counted as weights; their activations are not"


@dataclass(frozen=True, slots=True)
class _Owner:
    """A module with linears from the hidden size and back: an attention or an MLP; or one with stacked weights of experts.

    Attributes:
        module: That.
        up: Linears from the hidden size, or names of stacked weights.
        down: The linear back.
    """

    module: nn.Module
    up: tuple[Any, ...]
    down: Any

    @property
    def inner(self) -> int:
        return int(self.down.in_features)

    @property
    def outputs(self) -> int:
        return sum(int(linear.out_features) for linear in self.up)


@dataclass(frozen=True, slots=True)
class _Widths:
    """What the config says of attention: widths of all heads, and their numbers."""

    query: int
    key: int
    value: int
    output: int
    heads: int
    kv_heads: int


NO_ATTENTION = _Widths(0, 0, 0, 0, 0, 0)


def shape_of(model: nn.Module) -> Shape:
    """Read a model, adapters of PEFT included.

    Raises:
        ValueError: its config says no hidden size, it has an encoder, or its layers cannot be found.
    """
    name = type(model.get_base_model() if hasattr(type(model), "get_base_model") else model).__name__  # type: ignore[operator]
    text = _text_config(model)
    hidden = getattr(text, "hidden_size", None)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not isinstance(hidden, int):
        raise ValueError(
            f"{name}: memory and communication are computed for decoder-only models, whose config has a hidden_size."
        )
    all_layers = layers_of(model)
    layers = [layer for layer in all_layers if next(_owners(layer, hidden), None) is not None]
    if not layers:
        raise ValueError(f"{name}: none of its {len(all_layers)} layers has linears of the hidden size {hidden}.")
    notes = [TOWERS] if len(layers) < len(all_layers) else []
    read = tuple(_layer(layer, text, hidden, notes) for layer in layers)
    weights = tuple(_weights(model, layers, hidden))
    head = _head_weight(model)
    largest = max(weights, key=lambda weight: math.prod(weight.shape))
    return Shape(
        name=name,
        hidden=hidden,
        vocab=head.shape[0] if head is not None else 0,
        itemsize=largest.itemsize,
        frozen=not all(weight.trains for weight in weights if weight.kind == LAYER),
        head_trains=head is not None and head.requires_grad,
        layers=read,
        weights=weights,
        notes=tuple(dict.fromkeys(notes)),
    )


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _head_weight(model: nn.Module) -> nn.Parameter | None:
    for module in model.modules():
        if hasattr(type(module), "get_output_embeddings") and isinstance(head := output_head(module), nn.Module):
            return getattr(base_linear(head), "weight", None)
    return None


def _layer(layer: nn.Module, config: Any, hidden: int, notes: list[str]) -> Layer:
    widths = _widths(config)
    owners = list(_owners(layer, hidden))
    attention = [owner for owner in owners if _attends(owner, widths)]
    mlps = [owner for owner in owners if owner not in attention]
    latent = not attention and getattr(config, "kv_lora_rank", None) is not None
    if latent:
        notes.append(LATENT)
        mlps = [owner for owner in mlps if owner.inner != widths.output]
    elif not attention:
        notes.append(RECURRENT)
        widths = NO_ATTENTION
    experts, expert = _experts(layer, hidden)
    norms = [module for module in layer.modules() if _is_norm(module, hidden)]
    return Layer(
        query=widths.query,
        key=widths.key,
        value=widths.value,
        output=widths.output,
        heads=widths.heads,
        kv_heads=widths.kv_heads,
        mlp=sum(owner.inner for owner in mlps),
        gated=all(owner.outputs == 2 * owner.inner for owner in mlps),
        experts=experts,
        chosen=_first(config, EXPERTS_OF_A_TOKEN, 1) if experts else 0,
        expert=expert,
        norms=len(norms),
        plain_norms=sum(isinstance(norm, nn.LayerNorm) for norm in norms),
        qk_norm=any(_is_norm(m, None) for owner in attention for m in owner.module.children()),
        rank_attention=sum(_ranks(owner) for owner in attention),
        rank_mlp=sum(_ranks(owner) for owner in mlps),
    )


def _widths(config: Any) -> _Widths:
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return NO_ATTENTION
    of_key = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "qk_nope_head_dim", None) is None:
        return _Widths(heads * size, of_key * size, of_key * size, heads * size, heads, of_key)
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    value = heads * config.v_head_dim
    return _Widths(query, query, value, value, heads, heads)


def _owners(layer: nn.Module, hidden: int) -> Iterator[_Owner]:
    """The modules whose own linears go from the hidden size to another and back."""
    for module in layer.modules():
        linears = [child for child in module.children() if hasattr(child, "in_features") and child.out_features != 1]
        back = [linear for linear in linears if linear.out_features == hidden]
        back = [linear for linear in back if linear.in_features != hidden] or back[
            -1:
        ]  # the last one of a square attention
        up = tuple(linear for linear in linears if linear.in_features == hidden and linear not in back)
        if up and back and not hasattr(module, "lora_A"):
            yield _Owner(module, up, back[0])


def _attends(owner: _Owner, widths: _Widths) -> bool:
    if owner.inner != widths.output:
        return False
    all_three = widths.query + widths.key + widths.value
    return owner.outputs in (all_three, all_three + widths.query)  # with a gate on the output


def _experts(layer: nn.Module, hidden: int) -> tuple[int, int]:
    """Number of experts and their inner width, of stacked weights."""
    for module in layer.modules():
        if stacked := _stacked(module):
            smallest = min(stacked, key=lambda p: p.numel())
            return smallest.shape[0], smallest.numel() // (smallest.shape[0] * hidden)
    return 0, 0


def _is_norm(module: nn.Module, width: int | None) -> bool:
    """A module whose parameters are vectors, of that width, and which has no children."""
    weights = list(module.parameters(recurse=False))
    if not weights or next(module.children(), None) is not None or hasattr(module, "in_features"):
        return False
    return all(p.dim() == 1 and (width is None or p.shape[0] == width) for p in weights)


def _ranks(owner: _Owner) -> int:
    linears = [*owner.up, owner.down]
    adapters = [adapter for linear in linears for adapter in getattr(linear, "lora_A", {}).values()]
    return sum(int(adapter.out_features) for adapter in adapters)


def _weights(model: nn.Module, layers: list[nn.Module], hidden: int) -> Iterator[Weight]:
    units = units_of(model)
    unit_of = {id(p): (unit.path, unit.kind) for unit in units for p in unit.module.parameters()}
    cuts = _cuts(model, layers, hidden)
    for name, parameter in model.named_parameters():
        path, kind = unit_of.get(id(parameter), ("", ROOT))
        cut = cuts.get(id(parameter))
        yield Weight(name, tuple(parameter.shape), parameter.element_size(), parameter.requires_grad, path, kind, cut)


def _cuts(model: nn.Module, layers: list[nn.Module], hidden: int) -> dict[int, int]:
    """Id of a parameter -> the dimension that tensor ranks cut."""
    cuts: dict[int, int] = {}
    for layer in layers:
        for owner in _owners(layer, hidden):
            for linear in owner.up:
                cuts |= _linear_cuts(linear, COLUMN)
            cuts |= _linear_cuts(owner.down, ROW)
        for module in layer.modules():
            for p in _stacked(module):  # [E, 2F, H] and [E, H, F], or [E, H, 2F] and [E, F, H]
                cuts[id(p)] = 1 if p.shape[2] == hidden else 2
    for unit in units_of(model):
        if unit.kind != LAYER:
            cuts |= {id(p): 0 for p in unit.module.parameters() if p.dim() == 2}
    head = _head_weight(model)
    return cuts | ({id(head): 0} if head is not None else {})


def _stacked(module: nn.Module) -> list[nn.Parameter]:
    """Weights of all experts in one; empty where there are none."""
    found = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    return found if len(found) > 1 else []


def _linear_cuts(linear: nn.Module, dim: int) -> dict[int, int]:
    base = base_linear(linear)
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    cuts = {id(weight): dim}
    if bias is not None and dim == COLUMN:
        cuts[id(bias)] = 0
    adapters = getattr(linear, "lora_B" if dim == COLUMN else "lora_A", {})
    return cuts | {id(adapter.weight): dim for adapter in adapters.values()}


def _first(config: Any, names: tuple[str, ...], default: int) -> int:
    found = (getattr(config, name, None) for name in names)
    return next((number for number in found if isinstance(number, int)), default)
