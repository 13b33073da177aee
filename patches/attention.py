"""Attention: modules that dispatch through transformers' `AttentionInterface`, each served by whatever is fastest and proved.

The instance gets a copy of its forward in which the one global `ALL_ATTENTION_FUNCTIONS` is ours (rebind.py). It is asked with
the implementation that the config names, and the model's own eager function: so the config stays as it is, a later
`set_attn_implementation` is obeyed, and every call that we do not serve goes to exactly the function that would have run.
Models that build causal masks get mask functions that only say what the mask holds (attention_masks.py).
"""

import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.attention import BY_NAME, KERNEL
from automodel_accel.kernels.contract import AUTO, Choice, Refusal, Spec, choose
from automodel_accel.kernels.facts import this_machine
from automodel_accel.patches.attention_call import INTERFACE, Dispatcher, Site, eager_function, weights_recorder
from automodel_accel.patches.attention_masks import SERVED, Documents, looks_at_types, makers_in, with_lazy_masks
from automodel_accel.patches.attention_proof import experiment, mask_experiment
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.rebind import loaded_globals, rebind, writes_globals
from automodel_accel.patches.retype import MODEL, changed_by_accelerator, forward_replaced, retype

STAYS = "the original attention stays"
NOT_ASKED_FOR = "not asked for"
TIMED = "first in order; each kind of call is timed once among those that are proved"
_WIDTHS = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "dim_per_head")


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """What of an attention module decides how it is proved.

    Attributes:
        implementation: The transformers implementation that serves it: "sdpa" or "eager".
        eager: The model's own eager function; None with "sdpa".
        groups: Query heads per key head.
        width: Of query and key heads.
        value_width: Of value heads.
        softcap: Of the scores, or None.
        sinks: Whether it has a sink per head.
    """

    implementation: str
    eager: Callable[..., Any] | None
    groups: int
    width: int
    value_width: int
    softcap: float | None
    sinks: bool

    def label(self) -> str:
        """For the plan."""
        widths = f"{self.width} wide" if self.width == self.value_width else f"{self.width} and {self.value_width} wide"
        parts = (
            f"attention in place of {self.implementation}",
            widths,
            f"{self.groups} query heads a key head" if self.groups > 1 else "",
            f"soft-cap {self.softcap}" if self.softcap is not None else "",
            "sinks" if self.sinks else "",
        )
        return ", ".join(filter(None, parts))

    @property
    def features(self) -> frozenset[str]:
        """What every call of it asks for, in the kernel's words."""
        asked = {
            "soft-caps": self.softcap is not None,
            "sinks": self.sinks,
            "values of another width": self.width != self.value_width,
        }
        return frozenset(name for name, wanted in asked.items() if wanted)


@dataclass(frozen=True, slots=True)
class MaskForm:
    """The mask functions that a model's methods call: (method, names)."""

    makers: tuple[tuple[str, tuple[str, ...]], ...]


class AttentionPatch:
    """Matches, proves and swaps attention modules, and the models that build their masks."""

    fusion = "attention"
    kernel = KERNEL

    def __init__(self) -> None:
        self._rebound: dict[Hashable, Any] = {}
        self._documents = Documents()

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """Recognise a module whose forward asks the interface, or one that builds masks."""
        if _asks_interface(module):
            return (
                changed_by_accelerator(path, module)
                or forward_replaced(path, module)
                or _attention(path, module, context)
            )
        if _asks_through_super(type(module)):
            reason = "its forward asks the attention interface through super(), where no copy of it is reached"
            return Refusal(path, reason, STAYS)
        makers = makers_in(type(module))
        if not makers or "forward" in vars(module):
            return None
        curious = [type(child).__name__ for child in module.modules() if looks_at_types(type(child))]
        if curious:
            return Refusal(path or MODEL, f"{curious[0]} asks for the type of its mask", "masks are built as before")
        form = MaskForm(tuple(sorted(makers.items())))
        choices = {device: _choice(context, device, torch.float32, 1, frozenset()) for device in context.devices}
        return Claim(self.fusion, (path,), "causal masks that are not built", torch.float32, form, choices, "masks")

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """Native dtype and best implementation first; then the other implementations, and what a cast would bring."""
        if isinstance(claim.form, MaskForm):
            return [(device, torch.float32, "masks")]
        form: AttentionForm = claim.form  # type: ignore[assignment]
        winner = claim.choices[device].winner
        assert winner is not None
        asked_not = {refusal.what for refusal in claim.choices[device].refused if refusal.reason == NOT_ASKED_FOR}
        size = max(form.width, form.value_width)
        names = [winner.name, *(name for name in BY_NAME if name != winner.name)]
        keys = []
        for dtype in dict.fromkeys((claim.dtype, torch.float32, torch.bfloat16)):
            for name in names:
                spec = Spec(device, dtype, size, form.features)
                able = BY_NAME[name].objection(this_machine(), spec) is None
                if able and f"attention: {name}" not in asked_not:
                    keys.append((device, dtype, name))
        return keys

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """One small call of each kind that the implementation can serve."""
        if isinstance(claim.form, MaskForm):
            return mask_experiment(module, claim.form.makers, key[0])
        form: AttentionForm = claim.form  # type: ignore[assignment]
        return experiment(form, module, key)

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the module."""
        (module,) = modules
        if isinstance(claim.form, MaskForm):
            methods = {name: getattr(type(module), name) for name, _ in claim.form.makers}
            changed = {
                name: self._once((method, id(counts)), partial(with_lazy_masks, method, self._documents, counts))
                for name, method in methods.items()
            }
        else:
            forward: types.FunctionType = type(module).forward  # type: ignore[assignment]
            form: AttentionForm = claim.form  # type: ignore[assignment]
            changed = {
                "forward": self._once(
                    (forward, form, id(proven), id(counts)), partial(self._rebind, forward, form, proven, counts)
                )
            }
        retype(module, changed, counts)

    def _rebind(
        self, forward: types.FunctionType, form: AttentionForm, proven: Proven, counts: Counts
    ) -> types.FunctionType:
        allowed = {
            (device, dtype): tuple(name for d, t, name in proven if (d, t) == (device, dtype))
            for device, dtype, _ in proven
        }
        widths = form.groups, form.width, form.value_width
        site = Site(
            form.implementation, widths, form.softcap, form.sinks, allowed, self._documents, counts, weights_recorder()
        )
        return rebind(forward, {INTERFACE: Dispatcher(forward.__globals__[INTERFACE], site)})

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """One copy for all instances that are alike: torch.compile then compiles one."""
        if key not in self._rebound:
            self._rebound[key] = make()
        return self._rebound[key]


def _asks_interface(module: nn.Module) -> bool:
    forward = type(module).forward
    return isinstance(forward, types.FunctionType) and INTERFACE in loaded_globals(forward)


def _asks_through_super(cls: type[nn.Module]) -> bool:
    own = cls.forward
    if not isinstance(own, types.FunctionType) or "super" not in loaded_globals(own):
        return False
    inherited = (vars(base).get("forward") for base in cls.__mro__)
    return any(isinstance(f, types.FunctionType) and INTERFACE in loaded_globals(f) for f in inherited)


def _attention(path: str, module: nn.Module, context: Context) -> Claim | Refusal:
    forward: types.FunctionType = type(module).forward  # type: ignore[assignment]
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation not in SERVED:
        return Refusal(path, f"its attention implementation is {implementation!r}, expected 'sdpa' or 'eager'", STAYS)
    if writes_globals(forward):
        return Refusal(path, "its forward writes globals", STAYS)
    eager = eager_function(forward) if implementation == "eager" else None
    if implementation == "eager" and eager is None:
        return Refusal(path, "its forward names no eager attention function, or several", STAYS)
    widths = _widths(module)
    if widths is None:
        return Refusal(path, "the size of its heads is in none of its attributes", STAYS)
    softcap = _softcap(module) if implementation == "eager" else None
    sinks = isinstance(getattr(module, "sinks", None), torch.Tensor)
    form = AttentionForm(implementation, eager, *widths, softcap, sinks and implementation == "eager")
    dtype = _dtype(module)
    size = max(form.width, form.value_width)
    choices = {device: _choice(context, device, dtype, size, form.features) for device in context.devices}
    return Claim("attention", (path,), form.label(), dtype, form, choices, "attention")


def _choice(context: Context, device: str, dtype: torch.dtype, size: int, features: frozenset[str]) -> Choice:
    spec = Spec(device, dtype, size, features)
    choice = choose(KERNEL, context.facts, spec, context.wanted)
    if choice.winner is None and context.wanted != AUTO:
        fallback = choose(KERNEL, context.facts, spec)
        return replace(fallback, refused=choice.refused + fallback.refused)
    if context.wanted != AUTO:
        others = tuple(Refusal(f"attention: {name}", NOT_ASKED_FOR) for name in BY_NAME if name != context.wanted)
        return replace(choice, refused=others)
    return replace(choice, why=TIMED) if choice.others else choice


def _widths(module: nn.Module) -> tuple[int, int, int] | None:
    """(query heads a key head, width of query and key heads, width of value heads)."""
    groups = getattr(module, "num_key_value_groups", 1)
    width = next((value for name in _WIDTHS if isinstance(value := getattr(module, name, None), int)), None)
    config = getattr(module, "config", None)
    if width is None:
        hidden, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
        if not isinstance(hidden, int) or not isinstance(heads, int):
            return None
        width = hidden // heads
    value_width = getattr(module, "v_head_dim", width)
    if not isinstance(groups, int) or not isinstance(value_width, int):
        return None
    return groups, width, value_width


def _softcap(module: nn.Module) -> float | None:
    found = [value for name, value in vars(module).items() if "softcap" in name and isinstance(value, int | float)]
    return float(found[0]) if len(found) == 1 else None


def _dtype(module: nn.Module) -> torch.dtype:
    dtypes = (parameter.dtype for parameter in module.parameters())
    return next(
        (dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize >= 2), torch.get_default_dtype()
    )
