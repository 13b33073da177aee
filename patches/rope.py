"""Rotary position embeddings: a function that a module's methods call by a global name, swapped for `rope` in that instance alone.

Models keep the rotation in a plain function of the modeling file. What it computes is probed (rotary.py): which elements are a
pair, what cos and sin hold, where the heads are. The instance then gets copies of the methods that call it, in which that one
global name leads to ours (rebind.py); the function itself, its module and every other instance stay as they are.
"""

import functools
import inspect
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.rope import KERNEL, misfit, rope
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.rebind import loaded_globals, rebind, writes_globals
from automodel_accel.patches.retype import accelerator_of, changed_by_accelerator, forward_replaced, retype
from automodel_accel.patches.rotary import AXIS, Place, RopeForm, probe

HINTS = ("rotary", "rope")  # only globals with one of these in their name, or that take a cos and a sin, are probed
WIDTHS = (80, 128)  # of heads in the proof; where a form rotates parts of heads, half of the last
LOW_PRECISION = (torch.bfloat16, torch.float16)

Forms = tuple[tuple[str, RopeForm], ...]  # by the global's name
Functions = dict[str, types.FunctionType]


class RopePatch:
    """Matches, proves and swaps rotary functions."""

    fusion = "rope"
    kernel = KERNEL

    def __init__(self) -> None:
        self._found: dict[types.FunctionType, RopeForm | None] = {}
        self._callers: dict[type, dict[str, Any]] = {}
        self._rebound: dict[Hashable, Any] = {}

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """Recognise rotary functions that the module's methods call; refuse one that computes something else."""
        callers = self._callers_in(type(module))
        if not callers:
            return None
        no = changed_by_accelerator(path, module) or forward_replaced(path, module)
        if no is not None:
            return no
        reason = next((reason for name, caller in callers.items() if (reason := _objection(name, caller))), None)
        if reason is not None:
            return Refusal(path, reason, "the original function stays")
        functions = _functions(callers)
        other = next((name for function in functions.values() if (name := accelerator_of(function))), None)
        if other is not None:  # its kernels need not run on a probe's device
            return Refusal(
                path, f"its rotary function is {other}'s", "that stays; load the model without it to use ours"
            )
        forms: Forms = tuple(
            (name, form) for name, f in sorted(functions.items()) if (form := self._probed(f)) is not None
        )
        if not forms:
            reason = f"{' and '.join(sorted(functions))} computes no rotation that is known"
            return Refusal(path, reason, "the original function stays")
        dtype = _activation_dtype(module)
        label = " or ".join(dict.fromkeys(form.label() for _, form in forms))
        return Claim(self.fusion, (path,), label, dtype, forms, context.choices(KERNEL, dtype, 1), "rotary")

    def _callers_in(self, cls: type) -> dict[str, Any]:
        if cls not in self._callers:
            self._callers[cls] = _callers(cls)
        return self._callers[cls]

    def _probed(self, function: types.FunctionType) -> RopeForm | None:
        if function not in self._found:
            self._found[function] = probe(function)
        return self._found[function]

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """Native dtype first; then what autocast, a cast of the model or tables kept in float32 bring."""
        low = claim.dtype if claim.dtype in LOW_PRECISION else torch.bfloat16
        full = torch.float32
        pairs = [(claim.dtype, claim.dtype), (claim.dtype, full), (low, low), (low, full), (full, full), (full, low)]
        if claim.dtype is torch.float64:
            pairs = pairs[:2]
        if any("angles" in form.roles for _, form in claim.form):  # type: ignore[attr-defined]
            pairs = [(q, torch.promote_types(cos, full)) for q, cos in pairs]  # there is no complex bfloat16
        return list(dict.fromkeys((device, q, cos, autocast) for autocast in (False, True) for q, cos in pairs))

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """Heads of several widths, cut out of one tensor as a projection's output is, through the function and through ours."""
        forms: Forms = claim.form  # type: ignore[assignment]
        functions = _functions(self._callers_in(type(module)))
        device, q_dtype, cos_dtype, autocast = key
        generator = torch.Generator().manual_seed(0)
        q, k = (
            torch.randn(2, 2, heads, sum(WIDTHS), generator=generator, dtype=torch.float64).to(device)
            for heads in (4, 1)
        )

        def theirs(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return _every_width(forms, functions, leaves, cos_dtype)

        def ours(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            replaced = {
                name: _replacement(functions[name], form, {key: implementation}, Counts()) for name, form in forms
            }
            return _every_width(forms, replaced, leaves, cos_dtype)

        return Experiment(
            inputs={"x": q, "k": k},
            dtypes={"x": q_dtype, "k": q_dtype},
            theirs=theirs,
            ours=ours,
            truth=lambda leaves: _every_width(forms, None, leaves, cos_dtype),
            autocast=(q_dtype if q_dtype in LOW_PRECISION else torch.bfloat16) if autocast else None,
        )

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the module with copies of the methods that call a rotary function; equal modules share the copies."""
        (module,) = modules
        methods = {}
        for name, caller in self._callers_in(type(module)).items():
            key = caller, claim.form, id(proven), id(counts)
            if key not in self._rebound:
                # the two are kept beside, so that their ids stay theirs
                self._rebound[key] = _rebound(caller, claim.form, proven, counts), proven, counts  # type: ignore[arg-type]
            methods[name] = self._rebound[key][0]
        retype(module, methods, counts)


def _callers(cls: type) -> dict[str, Any]:
    """What the class has under each name by which it, or a base of it, calls a rotary function."""
    found: dict[str, Any] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            found.setdefault(name, value)
    return {name: value for name, value in found.items() if _rotary_globals(_code_of(value))}


def _code_of(value: Any) -> Any:
    """The function behind a method, a static method, a property or a decorator."""
    value = value.fget if isinstance(value, property) else value
    return inspect.unwrap(getattr(value, "__func__", value))


def _rotary_globals(function: Any) -> Functions:
    """The plain functions that the code of `function` calls by a global name, and that may rotate."""
    if not isinstance(function, types.FunctionType):
        return {}
    called = ((name, function.__globals__.get(name)) for name in sorted(loaded_globals(function)))
    return {name: value for name, value in called if isinstance(value, types.FunctionType) and _may_rotate(name, value)}


def _may_rotate(name: str, function: types.FunctionType) -> bool:
    code = inspect.unwrap(function).__code__
    parameters = [parameter.lower() for parameter in code.co_varnames[: code.co_argcount]]
    takes_angles = all(any(word in parameter for parameter in parameters) for word in ("cos", "sin"))
    return len(parameters) >= 3 and (takes_angles or any(hint in name.lower() for hint in HINTS))


def _functions(callers: Mapping[str, Any]) -> Functions:
    return {
        name: function for caller in callers.values() for name, function in _rotary_globals(_code_of(caller)).items()
    }


def _objection(name: str, caller: Any) -> str | None:
    """Why a method that calls a rotary function cannot be copied."""
    if not isinstance(caller, types.FunctionType) or hasattr(caller, "__wrapped__"):
        return f"its {name}, which calls a rotary function, is decorated: a copy would lose the decorator"
    if writes_globals(caller):
        return f"its {name}, which calls a rotary function, assigns globals: a copy would assign its own"
    return None


def _activation_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the first ordinary floating point parameter; quantised weights compute in the default dtype."""
    dtypes = (parameter.dtype for parameter in module.parameters())
    return next(
        (dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize >= 2), torch.get_default_dtype()
    )


def _rebound(caller: types.FunctionType, forms: Forms, proven: Proven, counts: Counts) -> types.FunctionType:
    functions = _rotary_globals(caller)
    ours = {name: _replacement(functions[name], form, proven, counts) for name, form in forms if name in functions}
    return rebind(caller, ours)


def _replacement(original: types.FunctionType, form: RopeForm, proven: Proven, counts: Counts) -> Callable[..., Any]:
    places = dict(form.places)

    @functools.wraps(original)
    def rotary(*args: Any, **kwargs: Any) -> Any:
        given = _bound(form, args, kwargs)
        if given is None:
            counts.count(counts.passed_on, "rope: called with arguments that were not proved")
            return original(*args, **kwargs)
        q, k, cos, sin, axis = given
        key = _call_key(q, k, cos, sin)
        implementation = proven.get(key)
        if implementation is None:
            counts.count(counts.passed_on, f"rope: not proved for {key}")
            return original(*args, **kwargs)
        head_axis = places.get((q.dim(), cos.dim(), axis))
        cos, sin = form.used(cos), form.used(sin)
        if head_axis is None or not _fits(form, q, k, cos, sin, head_axis):
            counts.count(counts.passed_on, "rope: shapes, or tables that want a gradient, that were not proved")
            return original(*args, **kwargs)
        counts.count(counts.fused, "rope")
        q_out, k_out = rope(q, k, cos, sin, **form.options(head_axis), implementation=implementation)
        return q_out if k is None else (q_out, k_out)

    return rotary


def _bound(form: RopeForm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """(q, k or None, cos, sin, unsqueeze_dim or None), or None for any other arguments."""
    given = dict(zip(form.parameters, args, strict=False))
    if len(args) > len(form.parameters) or any(name in given for name in kwargs):
        return None
    given.update(kwargs)
    axis = given.pop(AXIS, None)
    by_role = {role: given.pop(name) for name, role in zip(form.parameters, form.roles, strict=False) if name in given}
    if given or len(by_role) != len(form.roles):
        return None
    if "angles" in by_role:
        angles = by_role["angles"]
        if not isinstance(angles, torch.Tensor) or not angles.is_complex():
            return None
        return by_role["q"], by_role["k"], angles.real, angles.imag, axis
    return by_role["q"], by_role.get("k"), by_role["cos"], by_role["sin"], axis


def _call_key(*tensors: Any) -> CallKey:
    """What decides whether a call was proved; None for anything but plain tensors on one device."""
    q, _, cos, _ = tensors
    present = [tensor for tensor in tensors if tensor is not None]
    if not all(type(tensor) is torch.Tensor and tensor.device == q.device for tensor in present):
        return (None, " and ".join(sorted({type(tensor).__name__ for tensor in present})))
    return (q.device.type, q.dtype, cos.dtype, torch.is_autocast_enabled(q.device.type))


def _fits(
    form: RopeForm, q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, head_axis: int
) -> bool:
    rotary_dim = cos.shape[-1] * (1 if form.table == "element" else 2)
    whole = rotary_dim == q.shape[-1]
    return (whole or form.partial) and misfit(q, k, cos, sin, head_axis, form.table != "element") is None


def _every_width(
    forms: Forms,
    functions: Mapping[str, Callable[..., Any]] | None,
    leaves: Mapping[str, torch.Tensor],
    cos_dtype: torch.dtype,
) -> torch.Tensor:
    """All outputs of these functions (of the definitions where None) for heads of each width, whole and in part."""
    results: list[torch.Tensor] = []
    for name, form in forms:
        place = form.places[0][0]
        rotary_dims = (*WIDTHS[:-1], WIDTHS[-1] // 2 if form.partial else WIDTHS[-1])
        heads = (torch.split(leaves[leaf], list(WIDTHS), -1) for leaf in ("x", "k"))
        for q, k, rotary_dim in zip(*heads, rotary_dims, strict=True):
            pair = {"q": form.laid_out(q, place), "k": form.laid_out(k, place)}
            tables = _tables(form, place, rotary_dim, cos_dtype, q.device)
            for tensors in (pair,) if "k" in form.roles else ({"q": pair["q"]}, {"q": pair["k"]}):
                results += _outputs(form, functions[name] if functions else None, place, {**tensors, **tables})
    return torch.cat([result.flatten() for result in results])


def _tables(
    form: RopeForm, place: Place, rotary_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    row = (2, 2, form.table_size(rotary_dim))[3 - place[1] :]
    return {name: torch.randn(row, generator=generator).to(device, dtype) for name in ("cos", "sin")}


def _outputs(
    form: RopeForm, function: Callable[..., Any] | None, place: Place, tensors: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    if function is None:
        return form.define(place, {**tensors, "cos": tensors["cos"].double(), "sin": tensors["sin"].double()})
    outputs = form.call(function, place, tensors)
    assert outputs is not None
    return outputs
