"""Gated MLPs: recognised by what they compute, whatever their linears are called, swapped for `gated_linear`.

down(act(gate(x)) * up(x)) with three linears, or with two where one linear yields gate and up side by side. The swapped
forward CALLS the linears, so LoRA, quantised and FP8 linears keep working; only the activation and the product are fused.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.gated_linear import ACTIVATIONS, KERNEL, gated_linear, reference
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.probe import all_close, call, functional_copy, gradients, recognise
from automodel_accel.patches.retype import has_hooks, retype

HIDDEN = 12  # in place of the hidden size; the inner size is the real one, which some modules hold in a number
NEAR, EXACT = 1e-6, 1e-9  # in float64, of the largest element; a module that activates in float32 is only near
LAYOUTS = ("gate_up", "up_gate")


@dataclass(frozen=True, slots=True)
class MlpForm:
    """What the probe recognised.

    Attributes:
        inner: Length of the rows that are activated and multiplied.
        activation: "silu", "gelu" or "gelu_tanh".
        layout: None for separate gate and up, else the order of the halves in one linear's output.
        linears: Names of (gate, up, down), or (gate and up in one, down).
    """

    inner: int
    activation: str
    layout: str | None
    linears: tuple[str, ...]

    def label(self) -> str:
        """For the plan."""
        shape = "one linear for both" if self.layout else "two linears"
        return f"gated mlp, {self.activation}, {self.inner} wide, gate and up by {shape}"


class MlpPatch:
    """Matches, proves and swaps gated MLPs."""

    fusion = "mlp"
    kernel = KERNEL

    def __init__(self) -> None:
        self._found: dict[Hashable, MlpForm | str | None] = {}

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """Recognise a gated MLP; refuse one with another activation; None for anything else."""
        linears = _linears(module)
        if linears is None:
            return None
        found = recognise(path, module, self._found, lambda: _probe(module, linears))
        if not isinstance(found, MlpForm):
            return found
        dtype = _activation_dtype(module)
        return Claim(self.fusion, (path,), found.label(), dtype, found, context.choices(KERNEL, dtype, found.inner))

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """Native dtype first; then those that autocast or a cast of the whole model would bring."""
        dtypes = (claim.dtype, torch.float32, torch.bfloat16)
        return list(dict.fromkeys((device, dtype) for dtype in dtypes))

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """Narrow linears of the real inner width, through the original class and through the swapped one."""
        form: MlpForm = claim.form  # type: ignore[assignment]
        device: str = key[0]
        dtype: torch.dtype = key[1]
        generator = torch.Generator().manual_seed(0)
        inputs = {"x": torch.randn(2, 3, HIDDEN, generator=generator, dtype=torch.float64)}
        for name, shape in _shapes(form.linears, form.inner).items():
            inputs[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * shape[1] ** -0.5
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}

        def copy(leaves: Mapping[str, torch.Tensor]) -> nn.Module:
            return _copy(module, form.linears, leaves)

        def ours(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            swapped = copy(leaves)
            self.swap(claim, [swapped], {key: implementation}, Counts())
            return swapped(leaves["x"])  # type: ignore[no-any-return]

        return Experiment(
            inputs=inputs,
            dtypes=dict.fromkeys(inputs, dtype),
            theirs=lambda leaves: copy(leaves)(leaves["x"]),
            ours=ours,
            truth=lambda leaves: _definition(form, leaves),
        )

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the MLP."""
        form: MlpForm = claim.form  # type: ignore[assignment]
        (module,) = modules
        retype(module, {"forward": _forward(module, form, proven, counts)}, counts)


def _forward(module: nn.Module, form: MlpForm, proven: Proven, counts: Counts) -> Callable[..., Any]:
    original = type(module).forward
    *first, down = form.linears
    others = [(name, type(child)) for name, child in module.named_children() if name not in form.linears]

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            counts.count(counts.passed_on, "mlp: called with more than one input, or by keyword")
            return original(self, *args, **kwargs)
        if any(_is_changed(self._modules[name], was) for name, was in others):
            counts.count(counts.passed_on, "mlp: its activation or dropout was replaced, switched on or given hooks")
            return original(self, *args)
        projected = [getattr(self, name)(args[0]) for name in first]
        implementation = proven.get(_call_key(projected))
        if implementation is None:
            counts.count(counts.passed_on, f"mlp: not proved for {_call_key(projected)}")
            return getattr(self, down)(_activate(form, projected))
        counts.count(counts.fused, "mlp")
        gate, up = _gate_and_up(projected)
        layout = form.layout or "gate_up"
        inner = gated_linear(gate, up, activation=form.activation, layout=layout, implementation=implementation)
        return getattr(self, down)(inner)

    return forward


def _gate_and_up(projected: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    return projected[0], projected[1] if len(projected) == 2 else None


def _activate(form: MlpForm, projected: list[torch.Tensor]) -> torch.Tensor:
    """What the definition makes of the projections."""
    return reference.gated_linear(*_gate_and_up(projected), form.activation, form.layout or "gate_up")


def _is_changed(child: nn.Module | None, was: type[nn.Module]) -> bool:
    """Whether a child that the fused path does not call would do something else than when it was probed."""
    return type(child) is not was or has_hooks(child) or bool(child.training and getattr(child, "p", 0.0))


def _call_key(projected: list[torch.Tensor]) -> CallKey:
    plain = all(type(tensor) is torch.Tensor and tensor.dtype == projected[0].dtype for tensor in projected)
    return (projected[0].device.type, projected[0].dtype) if plain else (None, type(projected[0]).__name__)


def _linears(module: nn.Module) -> dict[str, tuple[int, int]] | None:
    """Name -> (in, out) of the two or three linears that hold all of the module's parameters, or None."""
    if any(parameter is not None for parameter in module._parameters.values()):
        return None
    found = {}
    for name, child in module.named_children():
        sizes = (getattr(child, "in_features", None), getattr(child, "out_features", None))
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            found[name] = (sizes[0], sizes[1])
        elif any(True for _ in child.parameters()):
            return None
    return found if len(found) in (2, 3) else None


def _activation_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the first ordinary floating point parameter; quantised weights compute in the default dtype."""
    dtypes = (parameter.dtype for parameter in module.parameters())
    return next(
        (dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize >= 2), torch.get_default_dtype()
    )


def _probe(module: nn.Module, linears: Mapping[str, tuple[int, int]]) -> MlpForm | str | None:
    """The form of a gated MLP, the reason against one that only looks like it, or None where the module is none."""
    roles = list(_possible_roles(linears))
    if not roles:
        return None
    inner, hidden = linears[roles[0][-1]]
    weights = _synthetic_weights(module, roles[0], HIDDEN if hidden == inner else inner)
    x = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    copy = _copy(module, roles[0], weights).eval()
    # the second input drives activations far out, where a clamp or a nearly-gelu shows
    pairs = [(given, call(copy, given)) for given in (x, x * 30)]
    for names in roles:
        for activation, layout in itertools.product(ACTIVATIONS, LAYOUTS if len(names) == 2 else (None,)):
            form = MlpForm(inner, activation, layout, names)
            if all(_close(output, _definition(form, {"x": given, **weights})) for given, output in pairs):
                return _objection(module, form, x, weights) or form
    if len(linears) == 3 and all(output is not None for _, output in pairs):
        return f"has the linears of a gated mlp, but computes something else than {', '.join(ACTIVATIONS)} of one input"
    return None


def _objection(module: nn.Module, form: MlpForm, x: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with an MLP whose values in evaluation are right."""

    def theirs(x: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
        return _copy(module, form.linears, dict(zip(weights, leaves, strict=True))).train()(x)  # type: ignore[no-any-return]

    def definition(x: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
        return _definition(form, {"x": x, **dict(zip(weights, leaves, strict=True))})

    leaves = (x, *weights.values())
    expected = definition(*leaves)
    if not all_close([theirs(*leaves)], [expected], NEAR):
        return "a gated mlp with dropout inside"
    if not all_close([theirs(*leaves)], [expected], EXACT):
        off = ((theirs(*leaves) - expected).abs().max() / expected.abs().max()).item()
        return f"only nearly a gated mlp with {form.activation}: off by {off:.1g} in float64, as one that activates in float32 is"
    if not all_close(gradients(theirs, leaves), gradients(definition, leaves), EXACT):
        return "a gated mlp with a gradient of its own"
    return None


def _possible_roles(linears: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, ...]]:
    """Every assignment of the linears to (gate, up, down), or to (gate and up in one, down), that their sizes allow."""
    for names in itertools.permutations(linears):
        *first, down = names
        inner, hidden = linears[down]
        if all(linears[name] == (hidden, inner if len(first) == 2 else 2 * inner) for name in first):
            yield names


def _synthetic_weights(module: nn.Module, names: tuple[str, ...], inner: int) -> dict[str, torch.Tensor]:
    """Weights of narrow linears by name, and biases by name + ".bias" for those that have one."""
    generator = torch.Generator().manual_seed(0)
    shapes = _shapes(names, inner)
    biases = [name for name in names if getattr(getattr(module, name), "bias", None) is not None]
    sizes = {**{name: shapes[name] for name in names}, **{f"{name}.bias": shapes[name][:1] for name in biases}}
    drawn = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    return {name: tensor * tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else tensor for name, tensor in drawn.items()}


def _shapes(names: tuple[str, ...], inner: int) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of narrow linears in these roles."""
    *first, down = names
    return {**dict.fromkeys(first, (inner if len(first) == 2 else 2 * inner, HIDDEN)), down: (HIDDEN, inner)}


def _copy(module: nn.Module, names: tuple[str, ...], weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """The module with narrow linears of these weights."""
    return functional_copy(module, {}, {name: _linear(weights[name], weights.get(f"{name}.bias")) for name in names})


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    # plain attributes, not Parameters: they may be autograd leaves that a probe or an experiment made
    del linear.weight, linear.bias
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear


def _definition(form: MlpForm, leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
    *first, down = form.linears
    projected = [_project(leaves["x"], leaves, name) for name in first]
    return _project(_activate(form, projected), leaves, down)


def _project(x: torch.Tensor, leaves: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    return nn.functional.linear(x, leaves[name], leaves.get(f"{name}.bias"))


def _close(output: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return output is not None and all_close([output], [expected], NEAR)
