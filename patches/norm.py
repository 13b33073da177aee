"""Norms: recognised by what they compute, swapped for `rms_norm`.

A candidate is a module without linears whose own parameters are at most one vector. The probe runs a copy with synthetic
weights: a norm does not change when its input is scaled; then the formula, the place of eps (at |x| ~ 1e-3), the offset of the
weight, and, by bit equality in bfloat16, where the model rounds.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.rms_norm import KERNEL, ORDERS, reference, rms_norm
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.probe import all_close, call, functional_copy, gradients, recognise
from automodel_accel.patches.retype import retype

FIXED_EPS = (torch.finfo(torch.float32).eps, 0.0, 1e-5, 1e-6, 1e-8, 1e-12, 1e-3)
WEIGHTLESS_SIZE = 48  # a norm without a weight takes any size; probe with this one
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class NormForm:
    """What the probe recognised.

    Attributes:
        size: Length of the weight, or None for a norm without one.
        weight: Name of the weight, or None.
        eps: Value found; `eps_name` is the attribute that holds it, read at each call, or None for a constant.
        offset: Added to the weight.
        order: Where the model rounds.
    """

    size: int | None
    weight: str | None
    eps: float
    eps_name: str | None
    offset: float
    order: str

    def label(self) -> str:
        """For the plan."""
        weight = "no weight" if self.weight is None else "1 + weight" if self.offset else "weight"
        rounding = "rounds, then scales" if self.order == "cast_then_mul" else "scales, then rounds"
        return f"rms_norm {self.size or 'any size'}, {weight}, eps {self.eps:g}, {rounding}"


class NormPatch:
    """Matches, proves and swaps norms."""

    fusion = "norm"
    kernel = KERNEL

    def __init__(self) -> None:
        self._found: dict[Hashable, NormForm | str | None] = {}

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """Recognise an RMS norm; refuse what normalises in another way; None for anything else."""
        if not _is_candidate(module):
            return None
        found = recognise(path, module, self._found, lambda: _probe(module))
        if not isinstance(found, NormForm):
            return found
        weight = getattr(module, found.weight) if found.weight else None
        dtype = weight.dtype if weight is not None else torch.get_default_dtype()
        if not dtype.is_floating_point or dtype.itemsize < 2:
            return Refusal(path, f"its weight is {dtype}; expected a floating point type", "the original forward stays")
        choices = context.choices(KERNEL, dtype, found.size or 1)
        return Claim(self.fusion, (path,), found.label(), dtype, found, choices)

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """Native dtype first; then mixed precision: activations, weights and autocast as a training loop may combine them."""
        low = claim.dtype if claim.dtype in LOW_PRECISION else torch.bfloat16
        pairs = [(claim.dtype, claim.dtype), (low, low), (low, torch.float32), (torch.float32, torch.float32)]
        if claim.dtype is torch.float64:
            pairs = pairs[:1]
        return list(dict.fromkeys((device, x, w, autocast) for autocast in (False, True) for x, w in pairs))

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """Rows of several scales through the original class and through the swapped one."""
        form: NormForm = claim.form  # type: ignore[assignment]
        device, x_dtype, weight_dtype, autocast = key
        size = form.size or WEIGHTLESS_SIZE
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, size, generator=generator, dtype=torch.float64)
        x[0] *= 1e-2
        inputs = {"x": x.to(device)}
        if form.weight:
            inputs["weight"] = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.5 - form.offset).to(
                device
            )

        def copy(leaves: Mapping[str, torch.Tensor]) -> nn.Module:
            return functional_copy(module, {form.weight: leaves["weight"]} if form.weight else {})

        def ours(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            swapped = copy(leaves)
            self.swap(claim, [swapped], {key: implementation}, Counts())
            return swapped(leaves["x"])  # type: ignore[no-any-return]

        return Experiment(
            inputs=inputs,
            dtypes={"x": x_dtype, "weight": weight_dtype},
            theirs=lambda leaves: copy(leaves)(leaves["x"]),
            ours=ours,
            truth=lambda leaves: reference.rms_norm(
                leaves["x"], leaves.get("weight"), form.eps, form.offset, form.order
            ),
            autocast=(x_dtype if x_dtype in LOW_PRECISION else torch.bfloat16) if autocast else None,
        )

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the norm."""
        form: NormForm = claim.form  # type: ignore[assignment]
        (module,) = modules
        retype(module, {"forward": _forward(type(module).forward, form, proven, counts)}, counts)


def _forward(original: Callable[..., Any], form: NormForm, proven: Proven, counts: Counts) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            counts.count(counts.passed_on, "norm: called with more than one input, or by keyword")
            return original(self, *args, **kwargs)
        x = args[0]
        weight = getattr(self, form.weight) if form.weight else None
        key = _call_key(x, weight)
        implementation = proven.get(key)
        if implementation is None:
            counts.count(counts.passed_on, f"norm: not proved for {key}")
            return original(self, x)
        counts.count(counts.fused, "norm")
        eps = getattr(self, form.eps_name) if form.eps_name else form.eps
        return rms_norm(x, weight, eps, offset=form.offset, order=form.order, implementation=implementation)

    return forward


def _call_key(x: Any, weight: Any) -> CallKey:
    """What decides whether a call was proved; None for anything but plain tensors of fitting shapes (DTensors, subclasses)."""
    if type(x) is not torch.Tensor or x.dim() == 0:
        return (None, type(x).__name__)
    if weight is None:
        return (x.device.type, x.dtype, x.dtype, torch.is_autocast_enabled(x.device.type))
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.shape != x.shape[-1:] or weight.device != x.device:
        return (None, type(weight).__name__)
    return (x.device.type, x.dtype, weight.dtype, torch.is_autocast_enabled(x.device.type))


def _is_candidate(module: nn.Module) -> bool:
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    if any(parameter.dim() > 1 for parameter in parameters) or len({parameter.shape for parameter in parameters}) > 1:
        return False
    if any(True for child in module.children() for _ in child.parameters()):
        return False
    return type(module).forward is not nn.Module.forward


def _probe(module: nn.Module) -> NormForm | str | None:
    """The form of an RMS norm, the reason against another norm, or None where the module is none."""
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    size = module._parameters[names[0]].numel() if names else WEIGHTLESS_SIZE  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(size, generator=generator) + 0.25 for name in names}
    x = _rows(size, generator)
    copy = functional_copy(module, tensors).eval()
    y = call(copy, x)
    if y is None or y.shape != x.shape or not _is_scale_invariant(copy, x, y):
        return None
    if _centres(y, list(tensors.values())):
        return "a norm that subtracts the mean (LayerNorm): torch's own fused kernel serves it"
    if len(names) > 1:
        return "a norm with a bias, which no kernel of ours has"
    weight = names[0] if names else None
    for (eps_name, eps), offset in itertools.product(_eps_candidates(module), (0.0, 1.0) if weight else (0.0,)):
        if _computes(copy, x, tensors.get(weight or ""), eps, offset):
            order = _rounding(module, weight, size, eps, offset)
            form = NormForm(size if weight else None, weight, eps, eps_name, offset, order or "")
            return _objection(copy, form, x, y, tensors) or form
    return "normalises, but by a formula that is not root mean square with eps inside"


def _rows(size: int, generator: torch.Generator) -> torch.Tensor:
    """Rows [2, 3, size], each with one element far out, where a clamp shows."""
    x = torch.randn(6, size, generator=generator)
    at = torch.arange(6)
    x[at, at % size] *= 100
    return x.view(2, 3, size)


def _objection(
    copy: nn.Module, form: NormForm, x: torch.Tensor, y: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> str | None:
    """What is wrong with a norm whose values in evaluation are right."""
    trained = call(copy.train(), x)
    if trained is None or not torch.equal(trained, y):
        return "a norm that computes something else in training"

    def theirs(x: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        return functional_copy(copy, dict(zip(tensors, weight, strict=True)))(x)  # type: ignore[no-any-return]

    def definition(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        return reference.rms_norm(x, weight, form.eps, form.offset)

    leaves = (x, *tensors.values())
    if not all_close(gradients(theirs, leaves), gradients(definition, [leaf.double() for leaf in leaves]), 1e-4):
        return "an RMS norm with a gradient of its own"
    return None if form.order else "an RMS norm that rounds where no kernel of ours does (bit comparison in bfloat16)"


def _is_scale_invariant(copy: nn.Module, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether a factor on the input does not matter, beyond what an eps of 1e-2 would do."""
    scaled = call(copy, x * 7.3)
    return (
        scaled is not None
        and torch.allclose(y, scaled, rtol=1e-2, atol=1e-4)
        and not torch.allclose(y, y[:1], rtol=1e-2)
    )


def _centres(y: torch.Tensor, tensors: list[torch.Tensor]) -> bool:
    """Whether the output, freed of a bias and of a scale or 1 + scale, has zero mean."""
    zero, one = torch.zeros(()), torch.ones(())
    pairs = [*itertools.permutations(tensors, 2), *((scale, zero) for scale in tensors or [one])]
    freed = ((y - bias) / (scale + offset) for scale, bias in pairs for offset in (0.0, 1.0))
    return any(bool((z.mean(-1).abs() < 1e-4 * z.abs().amax(-1)).all()) for z in freed)


def _eps_candidates(module: nn.Module) -> list[tuple[str | None, float]]:
    named = [(name, value) for name, value in vars(module).items() if isinstance(value, float) and 0 <= value < 1e-2]
    return [*named, *((None, eps) for eps in FIXED_EPS)]


def _computes(copy: nn.Module, x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float) -> bool:
    """Whether the formula holds for large, small and tiny rows and for zeros: the last tell an eps of 1e-12 from none."""
    wide = None if weight is None else weight.double()
    outputs = [(scale, call(copy, x * scale)) for scale in (1.0, 1e3, 1e-3, 1e-6, 0.0)]
    return all(
        y is not None
        and torch.allclose(
            y.double(),
            reference.rms_norm((x * scale).double(), wide, eps, offset),
            rtol=2e-5 if scale >= 1 else 2e-4,
            atol=2e-6,
            equal_nan=True,
        )
        for scale, y in outputs
    )


def _rounding(module: nn.Module, weight: str | None, size: int, eps: float, offset: float) -> str | None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 5, size, generator=generator).bfloat16()
    tensor = (torch.rand(size, generator=generator) + 0.25).bfloat16() if weight else None
    y = call(functional_copy(module, {weight: tensor} if weight and tensor is not None else {}), x)
    if y is None:
        return None
    exact = (order for order in ORDERS if _equal(y, reference.rms_norm(x, tensor, eps, offset, order)))
    return next(exact, None)


def _equal(y: torch.Tensor, expected: torch.Tensor) -> bool:
    return y.dtype == expected.dtype and torch.equal(y, expected)
