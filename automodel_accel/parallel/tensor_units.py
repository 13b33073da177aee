"""Which modules are cut over the tensor ranks, and how: by transformers' plan of the model, else as the swaps recognised them.

A unit takes the same input on all ranks and gives a sum over them: linears that are cut column-wise (q, k, v; gate, up), then one
that is cut row-wise (o; down). A plan names linears by patterns; those of one parent are a unit.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement
from transformers.pytorch_utils import Conv1D

from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.gated_linear import LAYOUTS
from automodel_accel.parallel.tensor_local import ONCE, SHARE, Held, packed
from automodel_accel.patches.attention_call import INTERFACE
from automodel_accel.patches.contract import Counts
from automodel_accel.patches.experts import OWN_GATE, ExpertsForm
from automodel_accel.patches.linear import shared_inputs
from automodel_accel.patches.mlp import MlpForm
from automodel_accel.patches.rebind import loaded_globals
from automodel_accel.patches.retype import original_class, owner_of

COLUMN, ROW, PACKED, EXPERTS = "colwise", "rowwise", "packed_colwise", "moe_tp_experts"
TRANSPOSED = "experts, stored (in, out)"
# transformers' styles whose parameters are whole on each rank, and serve its part
_WITHIN = ("replicated_with_grad_allreduce", "mla_kv_a_proj", "replicate")
STAYS = "it is computed whole on each rank"
LARGE = 10  # of the parameters of a layer, one in so many


@dataclass(slots=True)
class Unit:
    """What is cut together.

    Attributes:
        path: Of the module.
        module: That gives the sum.
        cuts: Parameter -> how it is cut.
        once: Parameters that are added to the sum: they count on one rank.
        linears: Name of a linear or a stacked weight of it -> COLUMN, ROW or PACKED; "" -> EXPERTS or TRANSPOSED where it is experts.
    """

    path: str
    module: nn.Module
    linears: dict[str, str]
    cuts: dict[nn.Parameter, Placement] = field(default_factory=dict)
    once: set[nn.Parameter] = field(default_factory=set)

    def held(self) -> list[Held]:
        """All its parameters."""
        found = []
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    found.append(Held(module, name, ONCE if parameter in self.once else SHARE))
        return found


def units_of(model: nn.Module, size: int) -> tuple[list[Unit], list[Refusal]]:
    """Units that can be cut over `size` ranks, and why others cannot.

    Raises:
        ValueError: heads that do not divide over the ranks, or weights that cannot be cut.
    """
    base: Any = model.get_base_model() if hasattr(type(model), "get_base_model") else model  # type: ignore[operator]
    prefix = next(name for name, module in model.named_modules() if module is base)
    provable = not any(parameter.is_meta for parameter in base.parameters())
    planned, formed = _planned(base), _formed(base, provable)
    if provable:
        formed = {**_derived(base), **formed}
    units: list[Unit] = []
    refusals: list[Refusal] = []
    for path in {**planned, **formed}:
        where = f"{prefix}.{path}" if prefix else path
        candidates = (formed.get(path), planned.get(path))
        is_experts = "" in (candidates[0] or ())  # whose gate the swaps may not know
        found = _heads_left_over(base, where, base.get_submodule(path), size) or _first_unit(
            base, path, candidates[::-1] if is_experts else candidates, size
        )
        if isinstance(found, str):
            refusals.append(Refusal(where, found, STAYS))
        elif found is not None and not any(_is_inside(path, unit.path) for unit in units):
            units.append(found)
    return units, refusals


def _first_unit(
    base: nn.Module, path: str, candidates: tuple[Mapping[str, str] | None, ...], size: int
) -> "Unit | str | None":
    reason: Unit | str | None = None
    for styles in candidates:
        if styles is not None:
            reason = _unit(base, path, styles, size)
            if isinstance(reason, Unit):
                return reason
    return reason


def _planned(base: Any) -> dict[str, dict[str, str]]:
    """Path of a unit -> name in it -> style, by transformers' plan."""
    plan: Mapping[str, str] = getattr(base, "tp_plan", None) or {}
    styles: dict[str, dict[str, str]] = defaultdict(dict)
    named = dict.fromkeys([name for name, _ in base.named_modules()] + [name for name, _ in base.named_parameters()])
    for name in named:
        style = plan.get(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name.replace(".base_layer", "")))
        if style is None or name.endswith(".base_layer"):
            continue
        unit, _, child = (name, "", "") if style == EXPERTS else name.rpartition(".")
        styles[unit][child] = style
    return {unit: found for unit, found in styles.items() if unit and len(found) > 1}


def _formed(base: nn.Module, provable: bool) -> dict[str, dict[str, str]]:
    """The same of MLPs and experts that the swaps recognised, whatever their linears are called."""
    report: Any = next(
        (owner.report for module in base.modules() if isinstance(owner := owner_of(module), Counts)), None
    )
    found: dict[str, dict[str, str]] = {}
    modules = dict(base.named_modules())
    for claim in report.applied if report is not None else ():
        if (styles := _styles_of(claim.form, provable)) is not None:
            paths = (path if path in modules else path.removeprefix("base_model.model.") for path in claim.paths)
            found |= {path: styles for path in paths if path in modules}
    return found


def _styles_of(form: object, provable: bool) -> dict[str, str] | None:
    if isinstance(form, MlpForm):
        *first, down = form.linears
        style = PACKED if form.layout in LAYOUTS and len(first) == 1 else COLUMN
        return {**dict.fromkeys(first, style), down: ROW}
    own_gate = isinstance(form, ExpertsForm) and form.activation == OWN_GATE
    if isinstance(form, ExpertsForm) and (provable or not own_gate):
        # a formula of ours takes halves; of others it is tried whether they take pairs that lie side by side
        style = PACKED if form.layout in LAYOUTS and not own_gate else COLUMN
        styles = dict(zip(form.names, (style, ROW) * 2, strict=False))
        return {"": TRANSPOSED if form.is_transposed else EXPERTS, **styles}
    return None


def _derived(base: nn.Module) -> dict[str, dict[str, str]]:
    """The same of attention: linears that are given what it is given are cut column-wise, the one that is left row-wise.

    Where more are left, those before the last one make heads of what the first ones compressed. A number a head goes with its head.
    """
    found = {}
    for path, module in base.named_modules():
        if not is_attention(module):
            continue
        linears = [name for name, child in module.named_children() if _is_linear(child)]
        named = shared_inputs(inspect.unwrap(original_class(module).forward).__code__)
        groups = [[name for name in group if name in linears] for group in named]
        first = next((group for group in groups if len(group) > 1), [])
        rest = [name for name in linears if name not in first]
        if (
            first and rest and (len(rest) == 1 or _heads(base, module)[1] != 1)
        ):  # one compressed head serves all queries
            heads = [
                name for name, p in module._parameters.items() if p is not None and p.numel() == _heads(base, module)[0]
            ]
            found[path] = {**dict.fromkeys([*(rest[:-1] or first), *heads], COLUMN), rest[-1]: ROW}
    return found


def _is_linear(module: nn.Module) -> bool:
    return original_class(_base_of(module)) is nn.Linear


def _unit(base: nn.Module, path: str, styles: Mapping[str, str], size: int) -> "Unit | str | None":
    module = base.get_submodule(path)
    unknown = sorted(set(styles.values()) - {COLUMN, ROW, PACKED, EXPERTS, TRANSPOSED, *_WITHIN})
    if unknown:
        return f"transformers' plan cuts it by {', '.join(unknown)}, which is not served"
    roles = {name: style for name, style in styles.items() if style not in _WITHIN}
    if not {ROW} < set(roles.values()) - {EXPERTS, TRANSPOSED}:
        return None
    unit = Unit(path, module, roles)
    for name, style in roles.items():
        if not name:
            continue
        if name not in module._parameters and original_class(_base_of(module.get_submodule(name))) is Conv1D:
            return f"{name} is a Conv1D, which computes with sizes of the whole"
        for dim, parts, parameter, once in _dims(module, name, style, TRANSPOSED in roles.values()):
            length = parameter.shape[dim] // parts if not once else size
            if length % size:
                return f"{name} has {length} {'rows' if dim == 0 else 'columns'}, which {size} ranks do not divide"
            if once:
                unit.once.add(parameter)
            elif parts == 1:
                unit.cuts[parameter] = Shard(dim)
            else:
                unit.cuts[parameter] = packed(dim, parts)
    return unit


def _dims(
    module: nn.Module, name: str, style: str, is_transposed: bool
) -> Iterator[tuple[int, int, nn.Parameter, bool]]:
    """(dimension, parts that are packed in it, parameter, whether it is added to the sum instead) of what one name stands for."""
    own = module._parameters.get(name)
    if own is not None:
        yield _stacked_dims(own, style, is_transposed)
        return
    child: Any = module.get_submodule(name)
    linear = _base_of(child)
    _check_linear(name, child, linear)
    parts = 2 if style == PACKED else 1
    yield (1 if style == ROW else 0), parts, linear.weight, False
    if linear.bias is not None:
        yield 0, parts, linear.bias, style == ROW
    for part, rows in (("lora_A", False), ("lora_B", True)):
        for adapter in getattr(child, part, {}).values():
            if rows == (style != ROW):
                yield (0 if rows else 1), parts if rows else 1, adapter.weight, False


def _stacked_dims(parameter: nn.Parameter, style: str, is_transposed: bool) -> tuple[int, int, nn.Parameter, bool]:
    """Of one number a head; of stacked experts [E, out, in], or [E, in, out], and of their biases [E, out]."""
    last, is_vector = parameter.dim() - 1, parameter.dim() < 3
    goes_out = last if is_vector or is_transposed else last - 1
    dim = goes_out if style != ROW or is_vector else 2 * last - 1 - goes_out
    return dim, 2 if style == PACKED else 1, parameter, style == ROW and is_vector


def _base_of(child: Any) -> Any:
    """The linear that an adapter is around, or itself."""
    return getattr(child, "base_layer", child)


def _check_linear(name: str, child: Any, linear: Any) -> None:
    kind = original_class(linear)
    if not issubclass(kind, nn.Linear):
        raise ValueError(
            f"tensor parallel: {name} is a {kind.__name__}; expected a torch.nn.Linear, or LoRA around one. Load the model "
            "unquantised, or use Mesh(tensor=1)."
        )
    if getattr(child, "lora_variant", None):
        raise ValueError(
            f"tensor parallel: the adapter of {name} is a {type(next(iter(child.lora_variant.values()))).__name__}; expected plain "
            "LoRA (DoRA's norms are of whole rows). Use Mesh(tensor=1)."
        )
    if not linear.weight.is_floating_point() or linear.weight.dtype.itemsize < 2:
        raise ValueError(
            f"tensor parallel: the weight of {name} is {linear.weight.dtype}; expected one that is not quantised. Use Mesh(tensor=1)."
        )


def is_attention(module: nn.Module) -> bool:
    """Whether it asks transformers' attention interface."""
    forward = inspect.unwrap(original_class(module).forward)
    return inspect.isfunction(forward) and INTERFACE in loaded_globals(forward)


def _heads_left_over(base: Any, path: str, module: nn.Module, size: int) -> str | None:
    """Why the ranks cannot have whole heads each; of what computes on text an error, of vision towers and the like a reason."""
    if not is_attention(module):
        return None
    for name, count in zip(("attention", "key-value"), _heads(base, module), strict=True):
        if count is not None and count % size:
            if _config(base, module) is base.config.get_text_config():
                raise ValueError(
                    f"Mesh: tensor is {size}, but {path} has {count} {name} heads, of which each rank needs the same number; "
                    f"expected one of {[n for n in range(1, count + 1) if count % n == 0]}."
                )
            return f"it has {count} {name} heads, which {size} ranks do not divide"
    return None


def _heads(base: Any, module: Any) -> tuple[int | None, int | None]:
    """How many heads an attention has, of queries and of keys and values."""
    config = _config(base, module)
    if getattr(config, "is_heterogeneous", False):
        if (number := getattr(module, "layer_idx", None)) is None:
            return None, None
        config = config.per_layer_config[number]
    heads: int | None = getattr(config, "num_attention_heads", None)
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _config(base: Any, module: Any) -> Any:
    return getattr(module, "config", None) or base.config


def left_whole(
    model: nn.Module, units: list[Unit], refusals: list[Refusal], layers: list[nn.Module]
) -> Iterator[Refusal]:
    """Large parts of layers that nothing cuts, and that no refusal speaks of."""
    paths = {module: path for path, module in model.named_modules()}
    known = [*(paths[unit.module] for unit in units), *(no.what for no in refusals)]
    for layer in layers:
        least = _length(layer) / LARGE
        for name, child in layer.named_children():
            path = f"{paths[layer]}.{name}"
            if _length(child) > least and not any(_is_inside(path, one) or _is_inside(one, path) for one in known):
                yield Refusal(path, "no plan says how it can be cut", STAYS)


def _length(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_inside(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")
