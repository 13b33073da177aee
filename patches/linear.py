"""Linears that share an input run as one node of autograd; and linears that save what their input was computed from.

Which children of a module take the same input is read from its forward: `self.q_proj(x) ... self.k_proj(x)` with no other value
given to `x` in between. While the module's forward runs, the first of them computes all, and the others take their result if they
are called with that very tensor, not written to since; else they compute their own. So a wrong guess costs time, never a result.
With recompute, each linear whose input is the output of a fused norm or activation saves that one's source (kernels/recompute.py).
PEFT's LoRA layers take part: what their adapters add is computed with the linear, in the same node of autograd (lora.py).
"""

import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.contract import AUTO, Refusal
from automodel_accel.kernels.fp8_linear.sharded import Gathered
from automodel_accel.kernels.linear import KERNEL, features, linears
from automodel_accel.kernels.lora import Adapter
from automodel_accel.kernels.recompute import region, source_of
from automodel_accel.patches import columns, lora
from automodel_accel.patches import linear_proof as proof
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.retype import RESTORE, is_retyped, retype

TENSORS = (nn.Parameter, torch.Tensor, Gathered)  # Gathered: only linears in 8 bits are told of it
SHARED = "_accel_shared"  # on the linears: what they share while the module's forward runs, else None
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class LinearForm:
    """What was recognised.

    Attributes:
        groups: Names of the children that share an input, for each input; empty for a linear on its own.
        biases: For each of them, in this order, whether it has a bias.
        adapted: Likewise, whether it is a LoRA layer.
        recompute: Whether a source is saved in place of an input.
    """

    groups: tuple[tuple[str, ...], ...]
    biases: tuple[bool, ...]
    adapted: tuple[bool, ...]
    recompute: bool

    def label(self) -> str:
        """For the plan."""
        said = ["; ".join(f"{', '.join(names)} of one input" for names in self.groups)] if self.groups else []
        if any(self.adapted):
            said.append("LoRA" if all(self.adapted) else "LoRA on some")
        if self.recompute:
            said.append("the input computed again in backward, where that is cheap")
        return ", ".join(said)


class LinearPatch:
    """Matches, proves and swaps linears."""

    fusion = "linear"
    kernel = KERNEL

    def __init__(self) -> None:
        self._taken: set[int] = set()
        self._groups: dict[CodeType, tuple[tuple[str, ...], ...]] = {}
        self._paths: dict[int, str] = {}

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """Recognise a module with linears of one input, or a linear; None for anything else."""
        if path == "":
            self._paths = {id(child): name for name, child in module.named_modules()}
            self._taken = {id(child) for name, child in module.named_modules() if name in context.taken}  # heads
        if type(module) is nn.Linear or lora.is_adapted(module):
            wanted = context.recompute or lora.is_adapted(module)
            return self._claim((), [module], [], context) if wanted and self._is_free(module) else None
        groups = tuple(
            filter(lambda names: len(names) > 1, map(functools.partial(self._own, module), self._read(module)))
        )
        if not groups or "forward" in vars(module):
            return None
        members = [module._modules[name] for names in groups for name in names]
        self._taken.update(map(id, members))
        return self._claim(groups, members, [module], context)

    def _own(self, module: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those that are linears, plain or adapted, of one width and dtype, and not taken."""
        children = {name: module._modules.get(name) for name in names}
        found: dict[str, Any] = {
            name: child
            for name, child in children.items()
            if type(child) is nn.Linear or (child is not None and lora.is_adapted(child))
        }
        kinds = {(child.in_features, child.weight.dtype) for child in found.values()}
        return tuple(found) if len(kinds) == 1 and all(map(self._is_free, found.values())) else ()

    def _is_free(self, module: nn.Module) -> bool:
        """Whether neither the module nor the linear inside of it is somebody's already."""
        return self._taken.isdisjoint((id(module), id(lora.base_of(module))))

    def _read(self, module: nn.Module) -> tuple[tuple[str, ...], ...]:
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is None:
            return ()
        if code not in self._groups:
            self._groups[code] = tuple(shared_inputs(code))
        return self._groups[code]

    def _claim(
        self, groups: tuple[tuple[str, ...], ...], members: Sequence[Any], parents: Sequence[Any], context: Context
    ) -> Claim | None:
        dtype = members[0].weight.dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            return None
        biases = tuple(lora.base_of(member).bias is not None for member in members)
        form = LinearForm(groups, biases, tuple(map(lora.is_adapted, members)), context.recompute is not None)
        paths = tuple(self._paths[id(module)] for module in (*members, *parents))
        asked = features(context.wanted != AUTO or any(map(lora.is_adapted, members)))
        choices = context.choices(KERNEL, dtype, members[0].in_features, asked)
        return Claim(self.fusion, paths, form.label(), dtype, form, choices, part="linear")

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """Native dtype first; then mixed precision: (device, dtype of the input, of the weights, autocast, of the adapters).

        Adapters are in the dtype of the weights, in the float32 in which PEFT keeps them, or switched off. Autocast computes
        with them in its own dtype, whatever theirs.
        """
        form: LinearForm = claim.form  # type: ignore[assignment]
        native, wide = claim.dtype, torch.float32
        low = native if native in LOW_PRECISION else torch.bfloat16
        calls = [(native, native, False), (wide, wide, False), (low, low, False)]
        calls += [(wide, wide, True), (low, wide, True), (low, low, True), (wide, low, True)]
        if native is torch.float64:
            calls = calls[:1]
        keys = []
        for x, weight, autocast in dict.fromkeys(calls):
            lows: list[torch.dtype | None] = [None] if form.groups or not any(form.adapted) else []
            if any(form.adapted):
                lows += dict.fromkeys((wide,) if autocast else (weight, torch.promote_types(weight, wide)))
            keys += [(device, x, weight, autocast, low) for low in lows]
        return keys

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """See linear_proof.py."""
        form: LinearForm = claim.form  # type: ignore[assignment]
        layers = [module._modules[name] for names in form.groups for name in names] if form.groups else [module]
        return proof.experiment(form, layers, key, implementation, _shared_outputs)

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the linears, and the module whose forward they share."""
        form: LinearForm = claim.form  # type: ignore[assignment]
        *members, parent = modules if form.groups else (*modules, None)
        for member in members:
            assert member is not None
            methods = {"forward": _member_forward(type(member).forward, form.recompute, proven, counts)}
            if proof.TRITON in proven.values() and lora.is_adapted(member):
                columns.allow(member, counts)
                methods[RESTORE] = columns.disallow
            retype(member, methods, counts)
        if proof.TRITON in proven.values():
            _leave_room(form, members, counts)
        if parent is not None:
            retype(parent, {"forward": parent_forward(type(parent).forward, form.groups)}, counts)


def _leave_room(form: LinearForm, members: Sequence[Any], counts: Counts) -> None:
    """Have the producers of these inputs leave room for what the adapters of each are given in one product."""
    for names in form.groups or ((),):
        group, members = (members[: len(names)], members[len(names) :]) if names else (members, ())
        needed = sum(
            columns.width(member) for member in group if lora.is_adapted(member) and columns.is_allowed(member)
        )
        if needed:
            size = group[0].in_features
            counts.rooms[size] = max(counts.rooms.get(size, 0), needed)


def _shared_outputs(members: list[nn.Module], x: torch.Tensor, proven: Proven, counts: Counts) -> list[torch.Tensor]:
    """What each of them gives, swapped and in one group."""
    names = tuple(map(str, range(len(members))))
    for member in members:
        retype(member, {"forward": _member_forward(type(member).forward, True, proven, counts)}, None)
    with Sharing(dict(zip(names, members, strict=True)), (names,)):
        return [member(x) for member in members]


class Sharing:
    """While entered, the linears of each group know one another."""

    def __init__(self, children: Mapping[str, nn.Module | None], groups: tuple[tuple[str, ...], ...]) -> None:
        self._members = [
            [child for name in names if (child := children.get(name)) is not None and is_retyped(child)]
            for names in groups
        ]

    def __enter__(self) -> None:
        for members in self._members:
            shared = Shared(members)
            for member in members:
                vars(member)[SHARED] = shared

    def __exit__(self, *exception: object) -> None:
        for members in self._members:
            for member in members:
                vars(member)[SHARED] = None


class Shared:
    """The results for one input that were computed before somebody asked for them."""

    def __init__(self, members: list[nn.Module]) -> None:
        self.members = members
        self.region = region()  # a checkpoint further in runs again when nothing is shared any more
        self._x: torch.Tensor | None = None
        self._version = 0
        self._outputs: dict[nn.Module, torch.Tensor] = {}

    def behind(self, member: nn.Module) -> list[nn.Module]:
        """Those that are called after it."""
        return self.members[self.members.index(member) + 1 :]

    def take(self, member: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """The member's result for this very tensor, as it is now."""
        return self._outputs.pop(member, None) if self._x is x and self._version == x._version else None

    def keep(self, members: Sequence[nn.Module], x: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
        """Remember the results of an input, in place of those of another one."""
        self._x, self._version = x, x._version
        self._outputs = dict(zip(members, outputs, strict=True))


def parent_forward(original: Callable[..., Any], groups: tuple[tuple[str, ...], ...]) -> Callable[..., Any]:
    """The forward of a module whose children share inputs."""

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or self.training):
            return original(self, *args, **kwargs)
        with Sharing(self._modules, groups):
            return original(self, *args, **kwargs)

    return forward


def is_served(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], in_triton: bool) -> bool:
    """Whether a call is one of a training step: with one plain tensor, outside of torch.compile, and where gradients are recorded."""
    if len(args) != 1 or kwargs or type(args[0]) is not torch.Tensor or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or (hasattr(layer, "lora_A") and lora.draws_here(layer, args[0], in_triton))


def _member_forward(
    original: Callable[..., Any], recompute: bool, proven: Proven, counts: Counts
) -> Callable[..., Any]:
    in_triton = proof.TRITON in proven.values()

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_served(self, args, kwargs, in_triton):
            return original(self, *args, **kwargs)
        input: torch.Tensor = args[0]
        shared: Shared | None = vars(self).get(SHARED)
        shared = shared if shared is not None and shared.region == region() else None
        if shared is not None and (output := shared.take(self, input)) is not None:
            return output
        if lora.is_adapted(self):
            if not self.training:
                return original(self, input)  # an evaluation gives PEFT's bits
            if (reason := lora.objection(self)) is not None:
                counts.count(counts.passed_on, f"linear: LoRA by PEFT: {reason}")
                return original(self, input)
        key, members = members_of_call(self, shared, input)
        source = source_of(input) if recompute and _is_needed_again(members) else None
        if len(members) == 1 and source is None and key[-1] is None:
            return original(self, input)
        implementation = proven.get(key)
        if implementation is None:
            counts.count(counts.passed_on, f"linear: not proved for {key}")
            return original(self, input)
        counts.count(counts.fused, LinearPatch.fusion)
        bases = [lora.base_of(member) for member in members]
        weights, biases = [base.weight for base in bases], [base.bias for base in bases]
        adapters = _adapters(members, bases, proof.weight_is_computed(key) and implementation == proof.TRITON)
        output, *rest = linears(input, weights, biases, adapters=adapters, source=source, implementation=implementation)
        if shared is not None:
            shared.keep(members[1:], input, rest)
        return output

    return forward


def members_of_call(member: Any, shared: "Shared | None", x: torch.Tensor) -> tuple[CallKey, list[Any]]:
    """The key of a call, and the linears that are computed in it: those that share x, and whose keys go together."""
    key, members = _call_key(member, x), [member]
    for other in shared.behind(member) if shared is not None else ():
        if lora.is_adapted(other) and (not other.training or lora.objection(other) is not None):
            break  # PEFT draws its masks next
        *place, low = _call_key(other, x)
        if place == list(key[:-1]) and (low is None or key[-1] in (None, low)):
            key, members = (*place, key[-1] or low), [*members, other]
    return key, members


def _adapters(members: Sequence[Any], bases: Sequence[Any], beside: bool) -> list[Adapter | None]:
    """What each of them adds, if anything; `beside`: with columns beside the weights, where they can have some."""
    adapters = [lora.adapter_of(member) if lora.is_adapted(member) else None for member in members]
    return columns.with_columns(bases, adapters) if beside else adapters


def _is_needed_again(members: Sequence[Any]) -> bool:
    """Whether backward needs the input: for the gradient of a weight, or of an adapter's A."""
    return any(lora.is_adapted(member) or member.weight.requires_grad for member in members)


def _call_key(linear: Any, x: torch.Tensor) -> CallKey:
    """What decides whether a call was proved; None first where the parameters are not plain tensors of fitting shapes."""
    base = lora.base_of(linear)
    autocast = torch.is_autocast_enabled(x.device.type)
    low = None if base is linear else torch.float32 if autocast else lora.dtype_of_adapter(linear)
    weight, bias = base.weight, base.bias
    if type(weight) not in TENSORS or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        return (None, type(weight).__name__, low)
    if weight.device != x.device or (bias is not None and (bias.dtype, bias.device) != (weight.dtype, weight.device)):
        return (None, "parameters apart", low)
    return x.device.type, x.dtype, weight.dtype, autocast, low


def shared_inputs(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Names of children that the code calls with one local variable, and nothing else, while that has one value."""
    own = code.co_varnames[0] if code.co_argcount else None
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("PUSH_NULL", "CACHE", "PRECALL")]
    called: dict[str, dict[str, None]] = {}
    for owner, child, given, call in zip(steps, steps[1:], steps[2:], steps[3:], strict=False):
        if "STORE_FAST" in owner.opname:
            for name in owner.argval if isinstance(owner.argval, tuple) else (owner.argval,):
                yield tuple(called.pop(name, ()))
        loaded = owner.argval if "LOAD_FAST" in owner.opname else None
        last = loaded[-1] if isinstance(loaded, tuple) else loaded  # several in one step since Python 3.13
        if last is None or last != own or child.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            continue
        by_name = given.opname.startswith("LOAD_FAST") and isinstance(given.argval, str)
        if by_name and call.opname.startswith("CALL") and call.opname != "CALL_FUNCTION_KW" and call.arg == 1:
            called.setdefault(given.argval, {})[child.argval] = None
    yield from map(tuple, called.values())
