"""FP8 linears: the products of a training step take 8-bit values (kernels/fp8_linear); parameters stay what they are.

Asked for with `fp8=`, never taken by itself: it changes what is computed. "auto" takes the linears whose shape pays (fp8_shapes.py)
on a GPU that multiplies 8-bit values; a recipe that is named takes every linear that may be. Never the head, what is tied to an
embedding, a router, or an adapter's own A and B. Linears that share an input are found and shared as plain ones are (linear.py):
one cast of the input, one of the weights, one product for its gradient. A LoRA layer's base is multiplied in 8 bits, and what its
adapter adds is computed beside it in its own dtype (kernels/lora/beside.py).
"""

import fnmatch
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from automodel_accel.kernels.contract import AUTO, Refusal
from automodel_accel.kernels.facts import Facts
from automodel_accel.kernels.fp8_linear import KERNEL, MULTIPLE, Recipe, features, fp8_linears
from automodel_accel.kernels.fp8_linear.history import Histories
from automodel_accel.kernels.fp8_linear.noted import Wish
from automodel_accel.kernels.fp8_linear.products import NATIVE, engine_on, is_fast
from automodel_accel.kernels.fp8_linear.scaling import formats_here
from automodel_accel.kernels.fp8_linear.weights import HeldCast
from automodel_accel.kernels.lora.beside import beside
from automodel_accel.kernels.recompute import region, source_of
from automodel_accel.patches import fp8_base as base8
from automodel_accel.patches import fp8_proof as proof
from automodel_accel.patches import lora
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.fp8_shapes import worth
from automodel_accel.patches.heads import base_linear, output_head
from automodel_accel.patches.linear import (
    SHARED,
    LinearForm,
    LinearPatch,
    Shared,
    Sharing,
    members_of_call,
    parent_forward,
)
from automodel_accel.patches.retype import MODEL, RESTORE, restore, retype

WEIGHT = "_accel_weight"  # on a linear: the parameter that was there at `apply`
HELD = "_accel_held"  # on a linear: the cast of its weights, and of those that it is computed with
HISTORIES = "_accel_histories"  # on a linear: of its input, and of the gradients of those that it is computed with
RECIPES: Mapping[str, Recipe] = {
    "tensorwise": Recipe(),
    "rowwise": Recipe(rowwise=True),
    "tensorwise_e5m2": Recipe(wide_gradients=True),
    "delayed": Recipe(delayed=True),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Fp8Form:
    """What was recognised.

    Attributes:
        linears: Which linears, as linear.py has them.
        recipe: Name of how values are rounded.
    """

    linears: LinearForm
    recipe: str


class Fp8Patch(LinearPatch):
    """Matches, proves and swaps linears for products of 8-bit values."""

    fusion = "fp8"
    kernel = KERNEL

    def __init__(self) -> None:
        super().__init__()
        self._never: dict[int, str] = {}
        self._context: Context | None = None

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """Recognise a module with linears of one input, or a linear; say why another linear may not be."""
        if path == "":
            self._paths = {id(child): name for name, child in module.named_modules()}
            self._taken = {id(child) for name, child in module.named_modules() if name in context.taken}
            self._never, self._context = _never(module), context
            if (no := _no_gain(context)) is not None:
                return no
        if _no_gain(context) is not None or "forward" in vars(module):
            return None
        if type(module) is nn.Linear or lora.is_adapted(module):
            return self._match_one(path, module, context)
        return self._match_groups(module, context)

    def _match_one(self, path: str, module: Any, context: Context) -> Claim | Refusal | None:
        if not self._is_free(module) or not _is_chosen(path, context.fp8_layers):
            return None
        base = lora.base_of(module)
        self._taken.update((id(module), id(base)))
        if (reason := self._reason_against(module)) is not None:
            return Refusal(path, reason, "computed as before")
        gain = worth(base.in_features, base.out_features, base.weight.requires_grad)
        if _only_what_pays(context) and not gain.pays:
            return Refusal(path, f"{_sizes([base])} does not pay ({gain})", "computed as before")
        return self._claim_linears((), [module], [], context)

    def _match_groups(self, module: nn.Module, context: Context) -> Claim | None:
        groups = tuple(names for names in map(functools.partial(self._own, module), self._read(module)) if names)
        kept = []
        for names in groups:
            bases = [lora.base_of(module._modules[name]) for name in names]
            total = sum(base.out_features for base in bases)
            trains = any(base.weight.requires_grad for base in bases)
            if len(names) > 1 and (not _only_what_pays(context) or worth(bases[0].in_features, total, trains).pays):
                kept.append(names)
        if not kept:
            return None
        members = [module._modules[name] for names in kept for name in names]
        for member in members:
            self._taken.update((id(member), id(lora.base_of(member))))
        return self._claim_linears(tuple(kept), members, [module], context)

    def _own(self, module: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those that are free linears that may be, of one width and dtype."""
        free = super()._own(module, names)
        assert self._context is not None
        return tuple(
            name
            for name in free
            if self._reason_against(module._modules[name]) is None
            and _is_chosen(self._paths[id(module._modules[name])], self._context.fp8_layers)
        )

    def _reason_against(self, module: Any) -> str | None:
        base = lora.base_of(module)
        for part in (module, base):
            if id(part) in self._never:
                return self._never[id(part)]
        if base.weight.dtype not in DTYPES:
            return f"its weight is {base.weight.dtype}"
        if base.in_features % MULTIPLE or base.out_features % MULTIPLE:
            return f"{_sizes([base])}: not multiples of {MULTIPLE}, as 8-bit products take them"
        return None

    def _claim_linears(
        self, groups: tuple[tuple[str, ...], ...], members: Sequence[Any], parents: Sequence[Any], context: Context
    ) -> Claim:
        bases = [lora.base_of(member) for member in members]
        biases = tuple(base.bias is not None for base in bases)
        adapted = tuple(map(lora.is_adapted, members))
        recipe = context.fp8 if context.fp8 in RECIPES else "tensorwise"
        form = Fp8Form(LinearForm(groups, biases, adapted, context.recompute is not None), str(recipe))
        dtype = bases[0].weight.dtype
        choices = context.choices(KERNEL, dtype, bases[0].in_features, features(RECIPES[form.recipe]))
        paths = tuple(self._paths[id(module)] for module in (*members, *parents))
        label = f"{form.recipe}, {_said(groups, bases)}" + (", LoRA beside" if any(adapted) else "")
        label += _slower(context.facts)
        inside = tuple(self._paths[id(base)] for base in bases)
        return Claim(
            self.fusion, paths, label, dtype, form, choices, part="fp8 linear", taken=(*paths[: len(members)], *inside)
        )

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """As of plain linears, but for float64."""
        form: Any = claim.form
        return super().keys(replace(claim, form=form.linears), device)

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """See fp8_proof.py."""
        form: Any = claim.form
        groups = form.linears.groups
        layers = [module._modules[name] for names in groups for name in names] if groups else [module]
        return proof.experiment(form.linears, layers, key, RECIPES[form.recipe], implementation, _shared_outputs)

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the linears, and the module whose forward they share."""
        form: Any = claim.form
        count = len(form.linears.biases)
        for member in modules[:count]:
            base = lora.base_of(member)
            base8.allow(base, RECIPES[form.recipe], counts)
            vars(base)[WEIGHT] = weakref.ref(base.weight)
            forward = _member_forward(
                type(member).forward, RECIPES[form.recipe], form.linears.recompute, proven, counts
            )
            methods = {"forward": forward}
            if lora.is_adapted(member):
                methods |= {name: _with_weight(getattr(type(member), name)) for name in ("merge", "unmerge")}
                methods[RESTORE] = lambda layer: restore(layer.base_layer)
            retype(member, methods, counts)
        _ask(form, modules[:count], counts)
        for parent in modules[count:]:
            retype(parent, {"forward": parent_forward(type(parent).forward, form.linears.groups)}, counts)


def _ask(form: Fp8Form, members: Sequence[Any], counts: Counts) -> None:
    """Have the producers of these inputs note the largest value of each row, or where rows are all that is cast, their cast.

    Delayed scales need nothing of them.
    """
    if RECIPES[form.recipe].delayed:
        return
    bases = [lora.base_of(member) for member in members]
    rows_alone = RECIPES[form.recipe].rowwise and not any(base.weight.requires_grad for base in bases)
    wish = Wish(formats_here().e4m3 if rows_alone else None)
    for base in bases:
        counts.wishes[base.in_features] = wish if counts.wishes.get(base.in_features, wish) == wish else Wish()


def _member_forward(
    original: Callable[..., Any], recipe: Recipe, recompute: bool, proven: Proven, counts: Counts
) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training or not _is_plain(args, kwargs) or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        x: torch.Tensor = args[0]  # without gradients too: a reentrant checkpoint runs so first, and both must agree
        shared: Shared | None = vars(self).get(SHARED)
        shared = shared if shared is not None and shared.region == region() else None
        if shared is not None and (output := shared.take(self, x)) is not None:
            return output
        if lora.is_adapted(self) and (reason := lora.objection(self)) is not None:
            counts.count(counts.passed_on, f"fp8: LoRA by PEFT: {reason}")
            if self.lora_variant:  # DoRA and the like read the weight
                base8.put_back(self.base_layer)
            return original(self, x)
        key, members = members_of_call(self, shared, x)
        implementation = proven.get(key)
        if implementation is None:
            counts.count(counts.passed_on, f"fp8: not proved for {key}")
            return original(self, x)
        counts.count(counts.fused, Fp8Patch.fusion)
        output, *rest = _outputs(members, x, recipe, recompute, implementation, counts)
        if shared is not None:
            shared.keep(members[1:], x, rest)
        return output

    return forward


def _is_plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return len(args) == 1 and not kwargs and type(args[0]) is torch.Tensor


def _with_weight(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        base8.put_back(self.base_layer)
        return original(self, *args, **kwargs)

    return method


def _outputs(
    members: Sequence[Any], x: torch.Tensor, recipe: Recipe, recompute: bool, implementation: str, counts: Counts
) -> list[torch.Tensor]:
    """What each of them gives for x: the 8-bit product, and what its adapter adds."""
    bases = [lora.base_of(member) for member in members]
    source = source_of(x) if recompute else None
    held = base8.held(bases) or _held(members[0], bases)
    weights, biases = [base.weight for base in bases], [base.bias for base in bases]
    histories = _histories(members[0], counts) if recipe.delayed else None
    options: dict[str, Any] = {"held": held, "source": source, "histories": histories, "implementation": implementation}
    outputs = list(fp8_linears(x, weights, biases, recipe, **options))
    if held is not None and base8.release(bases, held.cast):
        vars(members[0]).pop(HELD)
    adapted = [i for i, member in enumerate(members) if lora.is_adapted(member)]
    if adapted:
        adapters = [lora.adapter_of(members[i]) for i in adapted]
        added = beside(x, [outputs[i] for i in adapted], adapters, given_away=True, source=source)
        for i, output in zip(adapted, added, strict=True):
            outputs[i] = output
    return outputs


def _histories(member: Any, counts: Counts) -> Histories:
    """Of the linears that are computed with this one; the report reads how many values saturated."""
    if HISTORIES not in vars(member):
        vars(member)[HISTORIES] = Histories()
        counts.histories.append(vars(member)[HISTORIES])
    return vars(member)[HISTORIES]  # type: ignore[no-any-return]


def weights_of(claim: Claim, model: nn.Module) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """Names and weights of the linears of each input."""
    form: Any = claim.form
    count = len(form.linears.biases)
    paths = list(claim.taken[count:])  # the linears themselves, inside of adapters
    for size in list(map(len, form.linears.groups)) or [1]:
        names, paths = tuple(paths[:size]), paths[size:]
        yield names, [model.get_submodule(name).weight for name in names]


def _held(member: Any, bases: Sequence[Any]) -> HeldCast | None:
    """Where the cast is kept: nowhere for parameters that are not those of `apply`, such as FSDP2's, which come and go."""
    if any((was := vars(base).get(WEIGHT)) is None or was() is not base.weight for base in bases):
        return None
    return vars(member).setdefault(HELD, HeldCast())  # type: ignore[no-any-return]


def _shared_outputs(
    members: list[nn.Module], x: torch.Tensor, recipe: Recipe, proven: Proven, counts: Counts
) -> list[torch.Tensor]:
    """What each of them gives, swapped and in one group."""
    names = tuple(map(str, range(len(members))))
    for member in members:
        retype(member, {"forward": _member_forward(type(member).forward, recipe, True, proven, counts)}, None)
    if recipe.delayed:
        vars(members[0])[HISTORIES] = proof.histories_of(x)
    with Sharing(dict(zip(names, members, strict=True)), (names,)):
        outputs = [member(x) for member in members]
    if recipe.delayed:
        proof.follow(vars(members[0])[HISTORIES].gradients, outputs)
    return outputs


def _only_what_pays(context: Context) -> bool:
    return context.fp8 == AUTO and not context.fp8_layers


def _no_gain(context: Context) -> Refusal | None:
    """Why "auto" takes nothing on this machine."""
    if context.fp8 in RECIPES or _is_fast(context.facts):
        return None
    return Refusal(
        MODEL,
        f'fp8="{context.fp8}": {context.facts.device} ({context.facts.arch}) multiplies 8-bit values no faster than bfloat16',
        f"nothing is swapped; name a recipe ({', '.join(RECIPES)}) to have it all the same, slower",
    )


def _is_fast(facts: Facts) -> bool:
    return facts.device == "cuda" and is_fast(facts.arch)


def _slower(facts: Facts) -> str:
    """What to expect where the hardware does not multiply 8-bit values."""
    if _is_fast(facts):
        return ""
    how = "computed by torch" if engine_on(facts.device) == NATIVE else "emulated"
    return f"; {how} on this {facts.device} ({facts.arch}), slower than without fp8"


def _is_chosen(path: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _never(model: nn.Module) -> dict[int, str]:
    """Linears that stay as they are, and why."""
    found: dict[int, str] = {}
    embeddings = {id(child.weight) for child in model.modules() if isinstance(child, nn.Embedding)}
    for child in model.modules():
        if isinstance(child, nn.Linear) and id(child.weight) in embeddings:
            found[id(child)] = "its weight is an embedding's too"
        if (head := output_head(child)) is not None:
            for part in (head, base_linear(head)):
                found[id(part)] = "it is the head, whose rounding the loss would feel most"
        if isinstance(child, LoraLayer):
            inside = (part for name, part in child.named_modules() if name and not name.startswith("base_layer"))
            found.update((id(part), "it is a part of an adapter") for part in inside)
        found.update((id(router), "it is a router") for router in _routers(child))
    return found


def _routers(module: nn.Module) -> list[nn.Module]:
    """Linears beside as many experts as they have outputs."""
    near = [part for child in module.children() for part in (child, *child.children())]
    counts = {len(part) for part in near if isinstance(part, nn.ModuleList)}
    stacks = [parameter for part in near for parameter in part._parameters.values() if parameter is not None]
    counts.update(parameter.shape[0] for parameter in stacks if parameter.dim() == 3)
    return [part for part in near if isinstance(part, nn.Linear) and part.out_features in counts]


def _sizes(bases: Sequence[Any]) -> str:
    return f"{bases[0].in_features} to {sum(base.out_features for base in bases)}"


def _said(groups: tuple[tuple[str, ...], ...], bases: Sequence[Any]) -> str:
    """Names, sizes, and what it is worth, of each input."""
    said, rest = [], list(bases)
    for names in groups or ((),):
        own, rest = (rest[: len(names)], rest[len(names) :]) if names else (rest, [])
        total = sum(base.out_features for base in own)
        gain = worth(own[0].in_features, total, any(base.weight.requires_grad for base in own))
        shared = f"{', '.join(names)} of one input, " if names else ""
        said.append(f"{shared}{_sizes(own)} ({gain})")
    return "; ".join(said)
