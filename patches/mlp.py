"""MLPs: recognised by what they compute, whatever their linears are called, swapped for `gated_linear` or `activation`.

Gated: down(act(gate(x)) * up(x)) with three linears, or with two where one linear yields gate and up side by side. Plain:
down(act(up(x))). The swapped forward CALLS the linears, so LoRA, quantised and FP8 linears keep working; only the activation
and the product are fused.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from automodel_accel.kernels import activation as activation_package
from automodel_accel.kernels import gated_linear as gated_package
from automodel_accel.kernels.activation import activation
from automodel_accel.kernels.contract import Kernel, Refusal
from automodel_accel.kernels.gated_linear import gated_linear
from automodel_accel.kernels.recompute import remember
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.probe import all_close, call, functional_copy, gradients, linear_of, recognise
from automodel_accel.patches.retype import has_hooks, original_class, retype

HIDDEN = 12  # in place of the hidden size; the inner size is the real one, which some modules hold in a number
NEAR, EXACT = 1e-6, 1e-9  # in float64, of the largest element; a module that activates in float32 is only near
LAYOUTS = ("gate_up", "up_gate")
PLAIN = "plain"
NEARLY = 1e-2  # so far from an activation of ours the reason names it
COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes of a weight that is not quantised


@dataclasses.dataclass(frozen=True, slots=True)
class MlpForm:
    """What the probe recognised.

    Attributes:
        inner: Length of the rows that are activated.
        activation: Such as "silu".
        layout: None for separate gate and up, the order of the halves in one linear's output, or "plain" for no gate.
        linears: Names of (gate, up, down), (gate and up in one, down), or (up, down).
        recompute: Whether all of it is computed again in backward, and only its input kept.
    """

    inner: int
    activation: str
    layout: str | None
    linears: tuple[str, ...]
    recompute: bool = False

    @property
    def kernel(self) -> Kernel:
        """What computes it."""
        return activation_package.KERNEL if self.layout == PLAIN else gated_package.KERNEL

    def label(self) -> str:
        """For the plan."""
        again = ", computed again in backward" if self.recompute else ""
        if self.layout == PLAIN:
            return f"mlp, {self.activation}, {self.inner} wide{again}"
        shape = "one linear for both" if self.layout else "two linears"
        return f"gated mlp, {self.activation}, {self.inner} wide, gate and up by {shape}{again}"


class MlpPatch:
    """Matches, proves and swaps MLPs."""

    fusion = "mlp"
    kernel = gated_package.KERNEL

    def __init__(self) -> None:
        self._found: dict[Hashable, MlpForm | str | None] = {}

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """Recognise an MLP; refuse one with another activation; None for anything else."""
        linears = _linears(module)
        if (
            linears is None or len({name.partition(".")[0] for name in linears}) < 2
        ):  # where one child has all, it is the place
            return None
        found = recognise(path, module, self._found, lambda: _probe(module, linears))
        if not isinstance(found, MlpForm):
            return found
        dtype = _activation_dtype(module)
        found = dataclasses.replace(found, recompute=context.recompute == "mlp")
        features = gated_package.FEATURES[found.activation] if found.layout != PLAIN else frozenset()
        choices = context.choices(found.kernel, dtype, found.inner, features)
        return Claim(self.fusion, (path,), found.label(), dtype, found, choices)

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
        for name, shape in _shapes(form.linears, form.inner, form.layout).items():
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
        methods = {"forward": _forward(module, form, proven, counts)}
        if form.recompute:
            methods["__call__"] = _recomputed(type(module).__call__)
        retype(module, methods, counts)


def _recomputed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around the whole call, so that what other swaps do around the forward is done again as well."""

    @functools.wraps(original)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return original(self, *args, **kwargs)
        return checkpoint(functools.partial(original, self), *args, use_reentrant=False, **kwargs)

    return __call__


def _forward(module: nn.Module, form: MlpForm, proven: Proven, counts: Counts) -> Callable[..., Any]:
    original = type(module).forward
    *first, down = form.linears
    others = [(name, original_class(child)) for name, child in _beside(module, form.linears)]

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            counts.count(counts.passed_on, "mlp: called with more than one input, or by keyword")
            return original(self, *args, **kwargs)
        if any(_is_changed(_child(self, name), was) for name, was in others):
            counts.count(counts.passed_on, "mlp: its activation or dropout was replaced, switched on or given hooks")
            return original(self, *args)
        if _dtypes_differ(_child(self, name) for name in form.linears):
            counts.count(counts.passed_on, "mlp: its linears have weights of several dtypes")
            return original(self, *args)
        projected = [_child(self, name)(args[0]) for name in first]
        implementation = proven.get(_call_key(projected))
        if implementation is None:
            counts.count(counts.passed_on, f"mlp: not proved for {_call_key(projected)}")
            return _child(self, down)(_activate(form, projected))
        counts.count(counts.fused, "mlp")
        fused = functools.partial(_fused, form, implementation)
        activated = counts.beside(_width(form, projected)).made_by(fused, *projected)
        remember(activated, fused, *projected)
        return _child(self, down)(activated)

    return forward


def _width(form: MlpForm, projected: Sequence[torch.Tensor]) -> int:
    """Of what is activated."""
    return projected[0].shape[-1] // (2 if form.layout in LAYOUTS and len(projected) == 1 else 1)


def _fused(form: MlpForm, implementation: str, *projected: torch.Tensor) -> torch.Tensor:
    if form.layout == PLAIN:
        return activation(projected[0], form.activation, implementation=implementation)
    gate, up = _gate_and_up(projected)
    layout = form.layout or "gate_up"
    return gated_linear(gate, up, activation=form.activation, layout=layout, implementation=implementation)


def _gate_and_up(projected: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    return projected[0], projected[1] if len(projected) == 2 else None


def _activate(form: MlpForm, projected: list[torch.Tensor]) -> torch.Tensor:
    """What the definition makes of the projections."""
    if form.layout == PLAIN:
        return activation_package.reference.activation(projected[0], form.activation)
    return gated_package.reference.gated_linear(*_gate_and_up(projected), form.activation, form.layout or "gate_up")


def _is_changed(child: nn.Module | None, was: type[nn.Module]) -> bool:
    """Whether a child that the fused path does not call would do something else than when it was probed."""
    return (
        child is None
        or original_class(child) is not was
        or has_hooks(child)
        or bool(child.training and getattr(child, "p", 0.0))
    )


def _dtypes_differ(linears: Iterator[nn.Module]) -> bool:
    """Whether the original may cast between its linears, as T5's does where its last one is kept in float32."""
    weights = (getattr(linear, "weight", None) for linear in linears)
    return len({x.dtype for x in weights if isinstance(x, torch.Tensor) and x.dtype in COMPUTED}) > 1


def _call_key(projected: list[torch.Tensor]) -> CallKey:
    plain = all(type(tensor) is torch.Tensor and tensor.dtype == projected[0].dtype for tensor in projected)
    return (projected[0].device.type, projected[0].dtype) if plain else (None, type(projected[0]).__name__)


def _linears(module: nn.Module) -> dict[str, tuple[int, int]] | None:
    """Dotted name -> (in, out) of the two or three linears below it that hold all of the module's parameters, or None."""
    if any(parameter is not None for parameter in module._parameters.values()):
        return None
    found: dict[str, tuple[int, int]] = {}
    for name, child in module.named_children():
        sizes = _sizes(child)
        below = {"": sizes} if sizes is not None else _linears(child) if _has_parameters(child) else {}
        if below is None or len(found) + len(below) > 3:
            return None
        found.update({f"{name}.{inner}" if inner else name: size for inner, size in below.items()})
    return found if found else None


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _child(module: nn.Module, path: str) -> nn.Module:
    for name in path.split("."):
        module = module._modules[name]  # type: ignore[assignment]
    return module


def _beside(module: nn.Module, linears: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Every module below but the linears and what is inside of them."""
    for name, child in module.named_children():
        if name not in linears:
            yield name, child
            below = tuple(path.partition(".")[2] for path in linears if path.startswith(f"{name}."))
            yield from ((f"{name}.{inner}", module) for inner, module in _beside(child, below))


def _sizes(linear: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear, or of a Conv1D as GPT-2 has it; None for another module."""
    sizes = (getattr(linear, "in_features", None), getattr(linear, "out_features", None))
    weight = getattr(linear, "weight", None)
    if isinstance(getattr(linear, "nf", None), int) and isinstance(weight, torch.Tensor):
        sizes = tuple(weight.shape)  # type: ignore[assignment]
    return sizes if len(sizes) == 2 and all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def _activation_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the first ordinary floating point parameter; quantised weights compute in the default dtype."""
    dtypes = (parameter.dtype for parameter in module.parameters())
    return next(
        (dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize >= 2), torch.get_default_dtype()
    )


def _probe(module: nn.Module, linears: Mapping[str, tuple[int, int]]) -> MlpForm | str | None:
    """The form of an MLP, the reason against one that only looks like it, or None where the module is none."""
    x = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found: str | None = None
    for names, layouts in _possible_roles(linears):
        inner, hidden = linears[names[-1]]
        is_square = hidden == inner and (layouts != (PLAIN,) or linears[names[0]] == (inner, inner))
        weights = _synthetic_weights(module, names, HIDDEN if is_square else inner, layouts)
        copy = _copy(module, names, weights).eval()
        # the others drive activations far out, where a clamp or a nearly-gelu shows
        pairs = [(given, call(copy, given)) for given in (x, x * 30, x * 1e4)]
        if any(output is None for _, output in pairs):
            continue
        activations = activation_package.ACTIVATIONS if layouts == (PLAIN,) else gated_package.ACTIVATIONS
        for name, layout in itertools.product(activations, layouts):
            form = MlpForm(inner, name, layout, names)
            if all(_close(output, _definition(form, {"x": given, **weights})) for given, output in pairs):
                return _objection(module, form, x, weights) or form
        if len(linears) == 3:
            found = f"has the linears of a gated mlp, but computes something else than {', '.join(activations)} of one input"
        elif layouts == (PLAIN,) and found is None:
            found = _another_activation(module, names, weights, x)
    return found


def _another_activation(
    module: nn.Module, names: tuple[str, ...], weights: Mapping[str, torch.Tensor], x: torch.Tensor
) -> str | None:
    """The reason against down(g(up(x))) where g is no activation of ours; None where g is linear, or there is no such g."""
    unit = {
        name: torch.eye(*w.shape, dtype=w.dtype) if w.dim() == 2 else torch.zeros_like(w) for name, w in weights.items()
    }
    copy = _copy(module, names, unit).eval()
    elsewhere = torch.cat([x[..., : HIDDEN // 2], x[..., HIDDEN // 2 :].flip(0) + 1], -1)
    outputs = [call(copy, given) for given in (x, elsewhere, -2 * x)]
    if any(output is None or output.shape != x.shape for output in outputs):
        return None
    y, y_elsewhere, y_scaled = (output for output in outputs if output is not None)
    own = HIDDEN // 2
    by_element = all_close([y_elsewhere[..., :own]], [y[..., :own]], EXACT)
    if not by_element or all_close([y_scaled], [-2 * y], EXACT):
        return None
    off = {
        name: ((y - function(x)).abs().max() / function(x).abs().max()).item()
        for name, function in activation_package.reference.ACTIVATIONS.items()
    }
    nearest = min(off, key=lambda name: off[name])
    if off[nearest] < NEARLY:
        return f"a plain mlp with an activation that is only nearly {nearest}: off by {off[nearest]:.1g} in float64"
    return f"has the linears of a plain mlp, but computes something else than {', '.join(off)} of one input"


def _objection(module: nn.Module, form: MlpForm, x: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with an MLP whose values in evaluation are right."""

    def theirs(x: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
        return _copy(module, form.linears, dict(zip(weights, leaves, strict=True))).train()(x)  # type: ignore[no-any-return]

    def definition(x: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
        return _definition(form, {"x": x, **dict(zip(weights, leaves, strict=True))})

    kind = "a plain mlp" if form.layout == PLAIN else "a gated mlp"
    leaves = (x, *weights.values())
    expected = definition(*leaves)
    if not all_close([theirs(*leaves)], [expected], NEAR):
        return f"{kind} with dropout inside"
    if not all_close([theirs(*leaves)], [expected], EXACT):
        off = ((theirs(*leaves) - expected).abs().max() / expected.abs().max()).item()
        return f"only nearly {kind} with {form.activation}: off by {off:.1g} in float64, as one that activates in float32 is"
    if not all_close(gradients(theirs, leaves), gradients(definition, leaves), EXACT):
        return f"{kind} with a gradient of its own"
    return None


def _possible_roles(
    linears: Mapping[str, tuple[int, int]],
) -> Iterator[tuple[tuple[str, ...], tuple[str | None, ...]]]:
    """Every assignment of the linears to the roles of a form that their sizes allow, with the layouts to try."""
    for names in itertools.permutations(linears):
        *first, down = names
        inner, hidden = linears[down]
        if len(first) == 2 and all(linears[name] == (hidden, inner) for name in first):
            yield names, (None,)
        elif len(first) == 1 and linears[first[0]] == (hidden, 2 * inner):
            yield names, LAYOUTS
        elif len(first) == 1 and linears[first[0]][1] == inner:
            yield names, (PLAIN,)


def _synthetic_weights(
    module: nn.Module, names: tuple[str, ...], inner: int, layouts: tuple[str | None, ...]
) -> dict[str, torch.Tensor]:
    """Weights of narrow linears by name, and biases by name + ".bias" for those that have one."""
    generator = torch.Generator().manual_seed(0)
    shapes = _shapes(names, inner, layouts[0])
    biases = [name for name in names if getattr(_child(module, name), "bias", None) is not None]
    sizes = {**{name: shapes[name] for name in names}, **{f"{name}.bias": shapes[name][:1] for name in biases}}
    drawn = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    return {name: tensor * tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else tensor for name, tensor in drawn.items()}


def _shapes(names: tuple[str, ...], inner: int, layout: str | None) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of narrow linears in these roles."""
    *first, down = names
    return {**dict.fromkeys(first, (2 * inner if layout in LAYOUTS else inner, HIDDEN)), down: (HIDDEN, inner)}


def _copy(module: nn.Module, names: tuple[str, ...], weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """The module with narrow linears of these weights."""
    return _replaced(module, {name: linear_of(weights[name], weights.get(f"{name}.bias")) for name in names})


def _replaced(module: nn.Module, linears: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the module with these linears, by their dotted names."""
    children = {}
    for first in {name.partition(".")[0] for name in linears}:
        below = {name.partition(".")[2]: linear for name, linear in linears.items() if name.partition(".")[0] == first}
        children[first] = below[""] if "" in below else _replaced(module._modules[first], below)  # type: ignore[arg-type]
    return functional_copy(module, {}, children)


def _definition(form: MlpForm, leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
    *first, down = form.linears
    projected = [_project(leaves["x"], leaves, name) for name in first]
    return _project(_activate(form, projected), leaves, down)


def _project(x: torch.Tensor, leaves: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    return nn.functional.linear(x, leaves[name], leaves.get(f"{name}.bias"))


def _close(output: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return output is not None and all_close([output], [expected], NEAR)
