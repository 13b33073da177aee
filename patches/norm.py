"""Norms: recognised by what they compute (norm_probe.py), swapped for `rms_norm`, `layer_norm` or `gated_rms_norm`."""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.contract import Kernel, Refusal
from automodel_accel.kernels.gated_norm import KERNEL as GATED_NORM
from automodel_accel.kernels.gated_norm import gated_rms_norm
from automodel_accel.kernels.layer_norm import KERNEL as LAYER_NORM
from automodel_accel.kernels.layer_norm import features as layer_norm_features
from automodel_accel.kernels.layer_norm import layer_norm
from automodel_accel.kernels.recompute import remember
from automodel_accel.kernels.rms_norm import KERNEL as RMS_NORM
from automodel_accel.kernels.rms_norm import features as rms_norm_features
from automodel_accel.kernels.rms_norm import rms_norm
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.norm_probe import WEIGHTLESS_SIZE, NormForm, recognise_norm
from automodel_accel.patches.probe import functional_copy
from automodel_accel.patches.retype import retype

LOW_PRECISION = (torch.bfloat16, torch.float16)
KERNELS: Mapping[str, Kernel] = {"rms": RMS_NORM, "layer": LAYER_NORM, "gated": GATED_NORM}

Parameter = torch.Tensor | None


class NormPatch:
    """Matches, proves and swaps norms."""

    fusion = "norm"
    kernel = RMS_NORM

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """Recognise a norm; refuse what normalises in another way; None for anything else."""
        form = recognise_norm(path, module, self._found)
        if form is None:
            return _called_a_norm(path, module)
        if not isinstance(form, NormForm):
            return form
        dtypes = {getattr(module, name).dtype for name in form.parameters} or {torch.get_default_dtype()}
        if len(dtypes) > 1:
            return Refusal(path, "its weight and its bias differ in dtype", "the original forward stays")
        (dtype,) = dtypes
        if not dtype.is_floating_point or dtype.itemsize < 2:
            return Refusal(path, f"its weight is {dtype}; expected a floating point type", "the original forward stays")
        choices = context.choices(KERNELS[form.kind], dtype, form.size or 1, _features(form, dtype))
        return Claim(self.fusion, (path,), form.label(), dtype, form, choices)

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """Native dtype first; then mixed precision: activations, weights and autocast as a training loop may combine them."""
        low = claim.dtype if claim.dtype in LOW_PRECISION else torch.bfloat16
        pairs = [(claim.dtype, claim.dtype), (low, low), (low, torch.float32), (torch.float32, torch.float32)]
        if not claim.form.parameters:  # type: ignore[attr-defined]
            pairs = [(dtype, dtype) for dtype in (claim.dtype, torch.float32, *LOW_PRECISION)]
        if claim.dtype is torch.float64:
            pairs = pairs[:1]
        return list(dict.fromkeys((device, x, w, autocast) for autocast in (False, True) for x, w in pairs))

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """Rows of several scales through the original class and through the swapped one."""
        form: NormForm = claim.form  # type: ignore[assignment]
        x_dtype: torch.dtype
        weight_dtype: torch.dtype
        device, x_dtype, weight_dtype, autocast = key
        size = form.size or WEIGHTLESS_SIZE
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, size, generator=generator, dtype=torch.float64)
        x[0] *= 1e-2
        inputs = {"x": x, "gate": torch.randn(2, 3, size, generator=generator, dtype=torch.float64)}
        names = tuple(inputs)[: form.inputs]
        inputs = {name: inputs[name] for name in names}
        for name in form.parameters:
            inputs[name] = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5 - form.offset

        def copy(leaves: Mapping[str, torch.Tensor]) -> nn.Module:
            return functional_copy(module, {name: leaves[name] for name in form.parameters})

        def ours(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            swapped = copy(leaves)
            self.swap(claim, [swapped], {key: implementation}, Counts())
            return swapped(*(leaves[name] for name in names))  # type: ignore[no-any-return]

        return Experiment(
            inputs={name: tensor.to(device) for name, tensor in inputs.items()},
            dtypes={**dict.fromkeys(names, x_dtype), **dict.fromkeys(form.parameters, weight_dtype)},
            theirs=lambda leaves: copy(leaves)(*(leaves[name] for name in names)),
            ours=ours,
            truth=lambda leaves: form.definition()(*(leaves[name] for name in (*names, *form.parameters))),
            autocast=(x_dtype if x_dtype in LOW_PRECISION else torch.bfloat16) if autocast else None,
        )

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the norm."""
        form: NormForm = claim.form  # type: ignore[assignment]
        (module,) = modules
        retype(module, {"forward": _forward(type(module).forward, form, proven, counts)}, counts)


def _features(form: NormForm, dtype: torch.dtype) -> frozenset[str]:
    """What the norm asks of its kernel where activations and parameters are of one dtype."""
    weight, bias = (dtype if name else None for name in (form.weight, form.bias))
    if form.kind == "rms":
        return rms_norm_features(dtype, weight, form.offset, form.order)
    return layer_norm_features(dtype, weight, bias, form.offset) if form.kind == "layer" else frozenset()


def _called_a_norm(path: str, module: nn.Module) -> Refusal | None:
    """Say so where a name raises the expectation that is not met; names decide nothing else."""
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    if "norm" not in type(module).__name__.lower() or not parameters:
        return None
    shapes = {tuple(parameter.shape) for parameter in parameters}
    reason = f"is called a norm, but its parameters are of shape {sorted(shapes)}, not one vector"
    if len(shapes) == 1 and parameters[0].dim() == 1:
        reason = "is called a norm, but does not normalise the last dimension of one tensor"
    return Refusal(path, reason, "the original forward stays")


def _forward(original: Callable[..., Any], form: NormForm, proven: Proven, counts: Counts) -> Callable[..., Any]:
    compute = computation(form)
    inputs, weight_name, bias_name, eps_name = form.inputs, form.weight, form.bias, form.eps_name

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) != inputs or kwargs:
            counts.count(counts.passed_on, _UNPROVED_CALL[inputs])
            return original(self, *args, **kwargs)
        weight = getattr(self, weight_name) if weight_name else None
        bias = getattr(self, bias_name) if bias_name else None
        key = _call_key(form, args, weight, bias)
        implementation = proven.get(key)
        if implementation is None:
            counts.count(counts.passed_on, f"norm: not proved for {key}")
            return original(self, *args)
        counts.count(counts.fused, "norm")
        eps = getattr(self, eps_name) if eps_name else form.eps
        output = counts.beside(args[0].shape[-1]).made_by(compute, *args, weight, bias, eps, implementation)
        remember(output, lambda *saved: compute(*saved, eps, implementation), *args, weight, bias)
        return output

    return forward


_UNPROVED_CALL = {
    1: "norm: called with more than one input, or by keyword",
    2: "norm: called without a gate, with more than a gate, or by keyword",
}


def computation(form: NormForm) -> Callable[..., torch.Tensor]:
    """The operation with the form's options: (*inputs, weight, bias, eps, implementation) -> y."""
    offset, order, gate_first, activation = form.offset, form.order, form.gate_first, form.activation or ""

    def rms(x: torch.Tensor, weight: Parameter, bias: Parameter, eps: float, implementation: str) -> torch.Tensor:
        return rms_norm(x, weight, eps, offset=offset, order=order, implementation=implementation)

    def layer(x: torch.Tensor, weight: Parameter, bias: Parameter, eps: float, implementation: str) -> torch.Tensor:
        return layer_norm(x, weight, bias, eps, offset=offset, order=order, implementation=implementation)

    def gated(
        x: torch.Tensor, gate: torch.Tensor, weight: Parameter, bias: Parameter, eps: float, implementation: str
    ) -> torch.Tensor:
        options: Any = {"activation": activation, "gate_first": gate_first, "order": order}
        return gated_rms_norm(x, gate, weight, eps, implementation=implementation, **options)

    computations: Mapping[str, Callable[..., torch.Tensor]] = {"rms": rms, "layer": layer, "gated": gated}
    return computations[form.kind]


def _call_key(form: NormForm, inputs: tuple[Any, ...], weight: Any, bias: Any) -> CallKey:
    """What decides whether a call was proved; None for anything but plain tensors of fitting shapes (DTensors, subclasses)."""
    x = inputs[0]
    if type(x) is not torch.Tensor or x.dim() == 0 or (form.size is not None and x.shape[-1] != form.size):
        return (None, type(x).__name__)
    for gate in inputs[1:]:
        if type(gate) is not torch.Tensor or (gate.shape, gate.dtype, gate.device) != (x.shape, x.dtype, x.device):
            return (None, "gate", type(gate).__name__, getattr(gate, "dtype", None))
    for parameter in (weight, bias):
        if parameter is not None and (
            type(parameter) not in (nn.Parameter, torch.Tensor)
            or parameter.shape != x.shape[-1:]
            or parameter.device != x.device
            or parameter.dtype is not weight.dtype
        ):
            return (None, type(parameter).__name__)
    dtype = x.dtype if weight is None else weight.dtype
    return (x.device.type, x.dtype, dtype, torch.is_autocast_enabled(x.device.type))
