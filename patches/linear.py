"""Linears that share an input run as one node of autograd; and linears that save what their input was computed from.

Which children of a module take the same input is read from its forward: `self.q_proj(x) ... self.k_proj(x)` with no other value
given to `x` in between. While the module's forward runs, the first of them computes all, and the others take their result if they
are called with that very tensor, not written to since; else they compute their own. So a wrong guess costs time, never a result.
With recompute, each linear whose input is the output of a fused norm or activation saves that one's source (kernels/recompute.py).
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

from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.linear import KERNEL, linears, reference
from automodel_accel.kernels.recompute import region, remember, source_of
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.probe import linear_of
from automodel_accel.patches.retype import is_retyped, retype

SHARED = "_accel_shared"  # on the linears: what they share while the module's forward runs, else None
LOW_PRECISION = (torch.bfloat16, torch.float16)
SIZES = (12, 5, 7, 3)  # of the input and, by turns, of the outputs in a proof


@dataclass(frozen=True, slots=True)
class LinearForm:
    """What was recognised.

    Attributes:
        groups: Names of the children that share an input, for each input; empty for a linear on its own.
        biases: For each of them, in this order, whether it has a bias.
        recompute: Whether a source is saved in place of an input.
    """

    groups: tuple[tuple[str, ...], ...]
    biases: tuple[bool, ...]
    recompute: bool

    def label(self) -> str:
        """For the plan."""
        if not self.groups:
            return "its input is computed again in backward, where that is cheap"
        shared = "; ".join(f"{', '.join(names)} of one input" for names in self.groups)
        return shared + (", computed again in backward" if self.recompute else "")


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
        if type(module) is nn.Linear:
            alone = context.recompute and id(module) not in self._taken
            return self._claim(LinearForm((), (module.bias is not None,), True), [module], context) if alone else None
        groups = tuple(
            filter(lambda names: len(names) > 1, map(functools.partial(self._own, module), self._read(module)))
        )
        if not groups or "forward" in vars(module):
            return None
        members = [module._modules[name] for names in groups for name in names]
        self._taken.update(map(id, members))
        biases = tuple(member.bias is not None for member in members)  # type: ignore[union-attr]
        return self._claim(LinearForm(groups, biases, context.recompute is not None), [*members, module], context)

    def _own(self, module: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those that are plain linears of one width and dtype, and not taken."""
        found = {name: child for name in names if type(child := module._modules.get(name)) is nn.Linear}
        kinds = {(child.in_features, child.weight.dtype) for child in found.values()}
        return tuple(found) if len(kinds) == 1 and self._taken.isdisjoint(map(id, found.values())) else ()

    def _read(self, module: nn.Module) -> tuple[tuple[str, ...], ...]:
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is None:
            return ()
        if code not in self._groups:
            self._groups[code] = tuple(_shared_inputs(code))
        return self._groups[code]

    def _claim(self, form: LinearForm, modules: Sequence[Any], context: Context) -> Claim | None:
        dtype = modules[0].weight.dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            return None
        paths = tuple(self._paths[id(module)] for module in modules)
        choices = context.choices(KERNEL, dtype, modules[0].in_features)
        return Claim(self.fusion, paths, form.label(), dtype, form, choices, part="linear")

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """Native dtype first; then mixed precision: (device, dtype of the input, of the weights, autocast)."""
        native, wide = claim.dtype, torch.float32
        low = native if native in LOW_PRECISION else torch.bfloat16
        calls = [(native, native, False), (wide, wide, False), (low, low, False)]
        calls += [(wide, wide, True), (low, wide, True), (low, low, True), (wide, low, True)]
        if native is torch.float64:
            calls = calls[:1]
        return [(device, *call) for call in dict.fromkeys(calls)]

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """Narrow linears of one input, as they are, and swapped: those of one group, with a source and without one."""
        form: LinearForm = claim.form  # type: ignore[assignment]
        device, x_dtype, weight_dtype, autocast = key
        x_type: torch.dtype = x_dtype
        weight_type: torch.dtype = weight_dtype
        inputs = {name: tensor.to(device) for name, tensor in _draw(form.biases).items()}

        def theirs(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            members = _members(form, leaves)
            return torch.cat([member(leaves["x"]).flatten() for _ in range(2) for member in members])

        def ours(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            members, counts, names = _members(form, leaves), Counts(), tuple(map(str, range(len(form.biases))))
            for member in members:
                retype(
                    member,
                    {"forward": _member_forward(type(member).forward, True, {key: implementation}, counts)},
                    None,
                )
            noted = leaves["x"] * 1
            remember(noted, lambda x: x * 1, leaves["x"])
            outputs = []
            for x in (leaves["x"], noted):
                with _Sharing(dict(zip(names, members, strict=True)), (names,)):
                    outputs += [member(x).flatten() for member in members]
            if counts.fused[self.fusion] != (2 if len(members) > 1 else 1):
                raise RuntimeError(f"the swapped linears did not take the fused path: {dict(counts.passed_on)}")
            return torch.cat(outputs)

        def truth(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            weights, biases = _parameters(form, leaves)
            return torch.cat([y.flatten() for _ in range(2) for y in reference.linears(leaves["x"], weights, biases)])

        return Experiment(
            inputs=inputs,
            dtypes={**dict.fromkeys(inputs, weight_type), "x": x_type},
            theirs=theirs,
            ours=ours,
            truth=truth,
            autocast=(x_type if x_type in LOW_PRECISION else torch.bfloat16) if autocast else None,
        )

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the linears, and the module whose forward they share."""
        form: LinearForm = claim.form  # type: ignore[assignment]
        *members, parent = modules if form.groups else (*modules, None)
        for member in members:
            assert member is not None
            retype(member, {"forward": _member_forward(type(member).forward, form.recompute, proven, counts)}, counts)
        if parent is not None:
            retype(parent, {"forward": _parent_forward(type(parent).forward, form.groups)}, counts)


class _Sharing:
    """While entered, the linears of each group know one another."""

    def __init__(self, children: Mapping[str, nn.Module | None], groups: tuple[tuple[str, ...], ...]) -> None:
        self._members = [
            [child for name in names if (child := children.get(name)) is not None and is_retyped(child)]
            for names in groups
        ]

    def __enter__(self) -> None:
        for members in self._members:
            shared = _Shared(members)
            for member in members:
                vars(member)[SHARED] = shared

    def __exit__(self, *exception: object) -> None:
        for members in self._members:
            for member in members:
                vars(member)[SHARED] = None


class _Shared:
    """The results for one input that were computed before somebody asked for them."""

    def __init__(self, members: list[nn.Module]) -> None:
        self.members = members
        self.region = region()  # a checkpoint further in runs again when nothing is shared any more
        self._x: torch.Tensor | None = None
        self._version = 0
        self._outputs: dict[nn.Module, torch.Tensor] = {}

    def take(self, member: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """The member's result for this very tensor, as it is now."""
        return self._outputs.pop(member, None) if self._x is x and self._version == x._version else None

    def keep(self, members: Sequence[nn.Module], x: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
        """Remember the results of an input, in place of those of another one."""
        self._x, self._version = x, x._version
        self._outputs = dict(zip(members, outputs, strict=True))


def _parent_forward(original: Callable[..., Any], groups: tuple[tuple[str, ...], ...]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return original(self, *args, **kwargs)
        with _Sharing(self._modules, groups):
            return original(self, *args, **kwargs)

    return forward


def _member_forward(
    original: Callable[..., Any], recompute: bool, proven: Proven, counts: Counts
) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Module, input: torch.Tensor) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or type(input) is not torch.Tensor:
            return original(self, input)
        shared: _Shared | None = vars(self).get(SHARED)
        shared = shared if shared is not None and shared.region == region() else None
        if shared is not None and (output := shared.take(self, input)) is not None:
            return output
        key = _call_key(self, input)
        others = shared.members if shared is not None else ()
        members = [self, *(other for other in others if other is not self and _call_key(other, input) == key)]
        source = source_of(input) if recompute and any(member.weight.requires_grad for member in members) else None
        if len(members) == 1 and source is None:
            return original(self, input)
        implementation = proven.get(key)
        if implementation is None:
            counts.count(counts.passed_on, f"linear: not proved for {key}")
            return original(self, input)
        counts.count(counts.fused, LinearPatch.fusion)
        weights, biases = [member.weight for member in members], [member.bias for member in members]
        output, *rest = linears(input, weights, biases, source=source, implementation=implementation)  # type: ignore[arg-type]
        if shared is not None:
            shared.keep(members[1:], input, rest)
        return output

    return forward


def _call_key(linear: Any, x: torch.Tensor) -> CallKey:
    """What decides whether a call was proved; None where the parameters are not plain tensors of fitting shapes."""
    weight, bias = linear.weight, linear.bias
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        return (None, type(weight).__name__)
    if weight.device != x.device or (bias is not None and (bias.dtype, bias.device) != (weight.dtype, weight.device)):
        return (None, "parameters apart")
    return x.device.type, x.dtype, weight.dtype, torch.is_autocast_enabled(x.device.type)


def _shared_inputs(code: CodeType) -> Iterator[tuple[str, ...]]:
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


def _draw(biases: Sequence[bool]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {"x": torch.randn(2, 3, SIZES[0], generator=generator, dtype=torch.float64)}
    for i, has_bias in enumerate(biases):
        width = SIZES[1 + i % (len(SIZES) - 1)]
        drawn[f"weight{i}"] = torch.randn(width, SIZES[0], generator=generator, dtype=torch.float64) * SIZES[0] ** -0.5
        if has_bias:
            drawn[f"bias{i}"] = torch.randn(width, generator=generator, dtype=torch.float64)
    return drawn


def _parameters(
    form: LinearForm, leaves: Mapping[str, torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    numbers = range(len(form.biases))
    return [leaves[f"weight{i}"] for i in numbers], [leaves.get(f"bias{i}") for i in numbers]


def _members(form: LinearForm, leaves: Mapping[str, torch.Tensor]) -> list[nn.Module]:
    return [linear_of(weight, bias) for weight, bias in zip(*_parameters(form, leaves), strict=True)]
