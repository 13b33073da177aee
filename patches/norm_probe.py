"""What kind of norm a module is, found out by running a copy of it with synthetic weights.

A candidate is a module without linears whose own parameters are at most two vectors. A norm does not change when its input is
scaled. Then the formula (root mean square; with the mean subtracted; with a gate), the place of eps (at |x| ~ 1e-3), the offset
of the weight, and, by bit equality in bfloat16, where the model rounds.
"""

import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.gated_norm import ACTIVATIONS
from automodel_accel.kernels.gated_norm import ORDERS as GATED_NORM_ORDERS
from automodel_accel.kernels.gated_norm import reference as gated_norm_reference
from automodel_accel.kernels.layer_norm import ORDERS as LAYER_NORM_ORDERS
from automodel_accel.kernels.layer_norm import reference as layer_norm_reference
from automodel_accel.kernels.rms_norm import ORDERS as RMS_NORM_ORDERS
from automodel_accel.kernels.rms_norm import reference as rms_norm_reference
from automodel_accel.patches.probe import all_close, call, functional_copy, gradients, recognise

FIXED_EPS = (torch.finfo(torch.float32).eps, 0.0, 1e-5, 1e-6, 1e-8, 1e-12, 1e-3)
WEIGHTLESS_SIZE = 48  # a norm without a weight mostly takes any size; probe with this one
LONGEST = 65536
SCALES = (1.0, 1e3, 1e-3, 1e-6, 0.0)  # the last two tell an eps of 1e-12 from none

Definition = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class NormForm:
    """What the probe recognised.

    Attributes:
        size: Length of the row, or None where any will do.
        weight: Name of the weight, or None.
        eps: Value found; `eps_name` is the attribute that holds it, read at each call, or None for a constant.
        offset: Added to the weight.
        order: Where the model rounds.
        kind: "rms", "layer" or "gated": which operation computes it.
        bias: Name of the bias, or None.
        activation: Of the second input, the gate; None but for "gated".
        gate_first: Whether the gate is multiplied before the norm.
    """

    size: int | None
    weight: str | None
    eps: float
    eps_name: str | None
    offset: float
    order: str
    kind: str = "rms"
    bias: str | None = None
    activation: str | None = None
    gate_first: bool = False

    @property
    def inputs(self) -> int:
        """How many tensors the norm is called with."""
        return 1 if self.activation is None else 2

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of weight and bias, as far as there are any."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def label(self) -> str:
        """For the plan."""
        weight = "no weight" if self.weight is None else "1 + weight" if self.offset else "weight"
        parameters = f"{weight} and bias" if self.bias else weight
        rounding = "rounds, then scales" if self.order == "cast_then_mul" else "scales, then rounds"
        gate = f"{self.activation}(gate) {'first' if self.gate_first else 'last'}, " if self.activation else ""
        name = {"rms": "rms_norm", "layer": "layer_norm", "gated": "gated_rms_norm"}[self.kind]
        return f"{name} {self.size or 'any size'}, {parameters}, {gate}eps {self.eps:g}, {rounding}"

    def definition(self, order: str | None = None) -> Definition:
        """The reference of the operation in this form, (*inputs, *parameters) -> y, rounding in `order` or the form's own."""
        order = order or self.order

        def define(*tensors: torch.Tensor) -> torch.Tensor:
            x, *gate = tensors[: self.inputs]
            named = dict(zip(self.parameters, tensors[self.inputs :], strict=True))
            weight, bias = (named.get(name) if name else None for name in (self.weight, self.bias))
            if self.activation is not None:
                options = (self.activation, self.gate_first, order)
                return gated_norm_reference.gated_rms_norm(x, gate[0], weight, self.eps, *options)
            if self.kind == "layer":
                return layer_norm_reference.layer_norm(x, weight, bias, self.eps, self.offset)
            return rms_norm_reference.rms_norm(x, weight, self.eps, self.offset, order)

        return define


def recognise_norm(path: str, module: nn.Module, findings: dict[Hashable, object]) -> NormForm | Refusal | None:
    """The form of a norm, the reason against a norm that no kernel computes, or None for anything else. Changes nothing.

    Args:
        path: Dotted name of the module.
        module: Any module.
        findings: What was found for each structure; filled here.
    """
    return recognise(path, module, findings, lambda: _probe(module)) if _is_candidate(module) else None


def _is_candidate(module: nn.Module) -> bool:
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    if any(parameter.dim() > 1 for parameter in parameters) or len({parameter.shape for parameter in parameters}) > 1:
        return False
    if any(True for child in module.children() for _ in child.parameters()):
        return False
    return type(module).forward is not nn.Module.forward


def _probe(module: nn.Module) -> NormForm | str | None:
    """The form of a norm, the reason against another norm, or None where the module is none."""
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    sizes = [module._parameters[names[0]].numel()] if names else _sizes_in(module)  # type: ignore[union-attr]
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        tensors = {name: torch.rand(size, generator=generator) + 0.25 for name in names}
        copy = functional_copy(module, tensors).eval()
        x, gate = _rows(size, generator), torch.randn(2, 3, size, generator=generator) * 3
        found = None
        for inputs in ((x, gate), (x,)):  # what takes a gate is called with one
            if len(inputs) <= _takes(module) and _is_norm(copy, inputs):
                found = _identify(copy, tensors, inputs)
            if isinstance(found, NormForm):
                return found
        if found is not None:
            return found
    return None


def _takes(module: nn.Module) -> int:
    """How many inputs the forward takes by position, at most 2."""
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
    except (ValueError, TypeError):
        return 1
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return min(len(by_position) - 1, 2)


def _is_norm(copy: nn.Module, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether a factor on the first input does not matter, beyond what an eps of 1e-2 would do."""
    x, *gate = inputs
    y, scaled = call(copy, x, *gate), call(copy, x * 7.3, *gate)
    return (
        y is not None
        and scaled is not None
        and y.shape == x.shape
        and torch.allclose(y, scaled, rtol=1e-2, atol=1e-4)
        and not torch.allclose(y, y[:1], rtol=1e-2)
    )


def _sizes_in(module: nn.Module) -> list[int]:
    """The row to probe a norm without a weight with, and the sizes that its attributes tell, where it does not take any."""
    values = [value for name, value in vars(module).items() if not name.startswith("_")]
    told = [value[0] if isinstance(value, tuple) and len(value) == 1 else value for value in values]
    sizes = [size for size in told if isinstance(size, int) and 1 < size <= LONGEST]
    return list(dict.fromkeys([WEIGHTLESS_SIZE, *sizes]))


def _identify(copy: nn.Module, tensors: dict[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> NormForm | str:
    x, *gate = inputs
    y = call(copy, *inputs)
    kind = "gated" if gate else "layer" if y is not None and _centres(y, list(tensors.values())) else "rms"
    if kind != "layer" and len(tensors) > 1:
        return "a norm with a bias, which no kernel of ours has"
    size = x.shape[-1] if tensors or not _takes_any_size(copy, len(inputs)) else None
    outputs = [(scale, call(copy, x * scale, *gate)) for scale in SCALES]
    for form in _forms(copy, kind, list(tensors), size):
        parameters = [tensors[name] for name in form.parameters]
        if _computes(form.definition(), outputs, inputs, parameters):
            order = _rounding(copy, form, x.shape[-1])
            return _objection(copy, form, tensors, inputs, order) or replace(form, order=order or "")
    return f"normalises, but by a formula that is not {_FORMULAS[kind]} with eps inside"


_FORMULAS = {
    "rms": "root mean square",
    "layer": "the mean subtracted, then root mean square",
    "gated": "root mean square with a gate",
}


def _forms(copy: nn.Module, kind: str, names: Sequence[str], size: int | None) -> Iterator[NormForm]:
    """All forms that a norm with these parameters may have, but for the rounding."""
    pairs: list[tuple[str | None, str | None]] = [(None, None)]
    if names:
        pairs = [(names[0], None)] if len(names) == 1 else list(itertools.permutations(names, 2))
    for (eps_name, eps), (weight, bias) in itertools.product(_eps_candidates(copy), pairs):
        form = NormForm(size, weight, eps, eps_name, 0.0, "mul_then_cast", kind, bias)
        if kind == "gated":
            for activation, first in itertools.product(ACTIVATIONS, (False, True)):
                yield replace(form, activation=activation, gate_first=first)
        else:
            yield form
            if weight is not None:
                yield replace(form, offset=1.0)


def _takes_any_size(copy: nn.Module, inputs: int) -> bool:
    x = torch.randn(2, 3, 2 * WEIGHTLESS_SIZE, generator=torch.Generator().manual_seed(0))
    y = call(copy, *[x] * inputs)
    return y is not None and y.shape == x.shape


def _rows(size: int, generator: torch.Generator) -> torch.Tensor:
    """Rows [2, 3, size], each with one element far out, where a clamp shows."""
    x = torch.randn(6, size, generator=generator)
    at = torch.arange(6)
    x[at, at % size] *= 100
    return x.view(2, 3, size)


def _objection(
    copy: nn.Module,
    form: NormForm,
    tensors: dict[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    order: str | None,
) -> str | None:
    """What is wrong with a norm whose values in evaluation are right."""
    evaluated, trained = call(copy.eval(), *inputs), call(copy.train(), *inputs)
    if evaluated is None or trained is None or not torch.equal(trained, evaluated):
        return "a norm that computes something else in training"

    def theirs(*leaves: torch.Tensor) -> torch.Tensor:
        named = dict(zip(form.parameters, leaves[form.inputs :], strict=True))
        return functional_copy(copy, named)(*leaves[: form.inputs])  # type: ignore[no-any-return]

    leaves = (*inputs, *(tensors[name] for name in form.parameters))
    expected = gradients(form.definition(), [leaf.double() for leaf in leaves])
    if not all_close(gradients(theirs, leaves), expected, 1e-4):
        return "a norm with a gradient of its own"
    return None if order else "a norm that rounds where no kernel of ours does (bit comparison in bfloat16)"


def _centres(y: torch.Tensor, tensors: list[torch.Tensor]) -> bool:
    """Whether the output, freed of a bias and of a scale or 1 + scale, has zero mean."""
    zero, one = torch.zeros(()), torch.ones(())
    pairs = [*itertools.permutations(tensors, 2), *((scale, zero) for scale in tensors or [one])]
    freed = ((y - bias) / (scale + offset) for scale, bias in pairs for offset in (0.0, 1.0))
    return any(bool((z.mean(-1).abs() < 1e-4 * z.abs().amax(-1)).all()) for z in freed)


def _eps_candidates(module: nn.Module) -> list[tuple[str | None, float]]:
    named = [(name, value) for name, value in vars(module).items() if isinstance(value, float) and 0 <= value < 1e-2]
    return [*named, *((None, eps) for eps in FIXED_EPS)]


def _computes(
    definition: Definition,
    outputs: Sequence[tuple[float, torch.Tensor | None]],
    inputs: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
) -> bool:
    """Whether the formula holds for large, small and tiny rows and for zeros."""
    others = [tensor.double() for tensor in (*inputs[1:], *parameters)]
    return all(
        y is not None
        and torch.allclose(
            y.double(),
            definition(inputs[0].mul(scale).double(), *others),
            rtol=2e-5 if scale >= 1 else 2e-4,
            atol=2e-6,
            equal_nan=True,
        )
        for scale, y in outputs
    )


def _rounding(module: nn.Module, form: NormForm, size: int) -> str | None:
    """The order in which the definition gives the bits of the module in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(8, 5, size, generator=generator).bfloat16() for _ in range(form.inputs)]
    parameters = [(torch.rand(size, generator=generator) + 0.25).bfloat16() for _ in form.parameters]
    y = call(functional_copy(module, dict(zip(form.parameters, parameters, strict=True))), *inputs)
    if y is None:
        return None
    if form.kind == "layer":
        return _rounding_of_layer_norm(form, y, inputs[0], parameters)
    orders = GATED_NORM_ORDERS if form.kind == "gated" else RMS_NORM_ORDERS
    exact = (order for order in orders if _equal(y, form.definition(order)(*inputs, *parameters)))
    return next(exact, None)


def _rounding_of_layer_norm(
    form: NormForm, y: torch.Tensor, x: torch.Tensor, parameters: Sequence[torch.Tensor]
) -> str | None:
    """By torch's own operation or step by step: their float32 values differ in the last bits, so their roundings may too."""
    named = dict(zip(form.parameters, parameters, strict=True))
    weight, bias = (named.get(name) if name else None for name in (form.weight, form.bias))
    shifted = weight + form.offset if weight is not None and form.offset else weight
    whole = F.layer_norm(x, x.shape[-1:], shifted, bias, form.eps)
    centred = x.float() - x.float().mean(-1, keepdim=True)
    steps = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + form.eps)
    steps = steps if shifted is None else shifted.float() * steps
    steps = steps if bias is None else steps + bias.float()
    wide = form.definition()(x, *parameters)
    return LAYER_NORM_ORDERS[0] if any(_equal(y, z.to(x.dtype)) for z in (whole, steps, wide)) else None


def _equal(y: torch.Tensor, expected: torch.Tensor) -> bool:
    return y.dtype == expected.dtype and torch.equal(y, expected)
