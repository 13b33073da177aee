"""Mixtures of experts with stacked weights: recognised by what they compute, swapped for `experts`.

A place owns the weights of all its experts in two tensors of three dimensions, in either order and orientation, with or without
biases, and is called with (hidden states, indices, weights of the top k). Its gate is a formula of ours, or its own
`_apply_gate`, which then runs between our matrix products. Modules that transformers dispatches through its ExpertsInterface are
served where they run transformers' own PyTorch code; where the user chose another accelerator's implementation
(`experts_implementation="sonicmoe"`), at load or at any time since, that one serves.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.activation import ACTIVATIONS as PLAIN
from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.experts import KERNEL, experts, reference
from automodel_accel.kernels.gated_linear import ACTIVATIONS as GATED
from automodel_accel.kernels.gated_linear import LAYOUTS
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.probe import PROBE_ERRORS, all_close, functional_copy, gradients, recognise
from automodel_accel.patches.retype import has_hooks, retype

HIDDEN, INNER, TOKENS = 16, 24, 12  # of a probe; multiples of 16 bytes, which grouped products ask for
NEAR, EXACT = 1e-6, 1e-9  # in float64, of the largest element; a module that computes in float32 is only near
OWN_GATE = "own"
UNCALLED = "stacked weights that are not called with hidden states, indices and weights of the top k"
# what transformers writes in PyTorch; all of it computes one function. A module outside of its interface has no config
DISPATCHED = (None, "eager", "grouped_mm", "batched_mm")


@dataclass(frozen=True, slots=True)
class ExpertsForm:
    """What the probe recognised.

    Attributes:
        count: How many experts.
        activation: Such as "silu", or "own" for the module's `_apply_gate`.
        layout: "gate_up" or "up_gate" for packed weights, "plain" for no gate.
        is_transposed: Whether the weights are stored (in, out).
        names: Names of (up, down), or (up, down, bias of up, bias of down).
        own_gate: What tells one `_apply_gate` from another; None for a formula of ours.
    """

    count: int
    activation: str
    layout: str
    is_transposed: bool
    names: tuple[str, ...]
    own_gate: Hashable = None

    def label(self) -> str:
        """For the plan."""
        gate = "a gate of its own" if self.activation == OWN_GATE else self.activation
        more = ("" if self.layout in LAYOUTS else ", no gate") + (", biases" if len(self.names) == 4 else "")
        return f"experts, {self.count} of them, {gate}{more}"


class ExpertsPatch:
    """Matches, proves and swaps mixtures of experts."""

    fusion = "experts"
    kernel = KERNEL

    def __init__(self) -> None:
        self._found: dict[Hashable, ExpertsForm | str | None] = {}

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """Recognise stacked experts; refuse those with another formula; None for anything else."""
        if sum(p is not None and p.dim() == 3 for p in module._parameters.values()) < 2:
            return None
        chosen = _implementation(module)
        if chosen not in DISPATCHED:
            return Refusal(path, f"experts_implementation={chosen!r} was chosen", f"{chosen} serves")
        found = recognise(path, module, self._found, lambda: _probe(module))
        if not isinstance(found, ExpertsForm):
            return found
        weight = module._parameters[found.names[0]]
        assert weight is not None
        inner = weight.shape[2 if found.is_transposed else 1]
        choices = context.choices(KERNEL, weight.dtype, inner)
        return Claim(self.fusion, (path,), found.label(), weight.dtype, found, choices)

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """(device, hidden states, experts' weights, router's weights): native first; then routers and casts as models have them."""
        native, wide, narrow = claim.dtype, torch.float32, torch.bfloat16
        dtypes = [(native, native, native), (native, native, wide), (narrow, native, wide), (narrow, native, narrow)]
        dtypes += [
            (wide, native, wide),
            *((dtype, dtype, router) for dtype in (wide, narrow) for router in (dtype, wide)),
        ]
        return list(dict.fromkeys((device, *some) for some in dtypes))

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """Few tokens through all experts with narrow weights, some of which no token chooses."""
        form: ExpertsForm = claim.form  # type: ignore[assignment]
        device, dtype, weight_dtype, router_dtype = key
        index = _index(form.count).to(device)
        drawn = {**_routed(index.shape[1]), **_synthetic_weights(form)}
        inputs = {name: tensor.to(device) for name, tensor in drawn.items()}
        dtypes = {**dict.fromkeys(inputs, weight_dtype), "x": dtype, "top_k_weights": router_dtype}

        def call(swapped: bool, leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            clone = functional_copy(module, {name: leaves[name] for name in form.names})
            if swapped:
                self.swap(claim, [clone], {key: implementation}, Counts())
            return clone(leaves["x"], index, leaves["top_k_weights"])  # type: ignore[no-any-return]

        return Experiment(
            inputs=inputs,
            dtypes=dtypes,
            theirs=functools.partial(call, False),
            ours=functools.partial(call, True),
            truth=lambda leaves: _definition(module, form, leaves, index),
        )

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the experts."""
        form: ExpertsForm = claim.form  # type: ignore[assignment]
        (module,) = modules
        retype(module, {"forward": _forward(module, form, proven, counts)}, counts)


def _forward(module: nn.Module, form: ExpertsForm, proven: Proven, counts: Counts) -> Callable[..., Any]:
    original = type(module).forward
    others = [(name, type(child)) for name, child in module.named_children()]
    chosen = _implementation(module)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        problem = _objection_to_call(self, args, kwargs, others, chosen)
        if problem is None:
            weights = [self._parameters.get(name) for name in form.names]
            key = _call_key(args, weights)
            implementation = proven.get(key)
            problem = None if implementation else f"not proved for {key}"
        if problem is not None:
            counts.count(counts.passed_on, f"experts: {problem}")
            return original(self, *args, **kwargs)
        counts.count(counts.fused, "experts")
        return _compute(experts, self, form, args, weights, implementation=implementation)

    return forward


def _compute(
    function: Callable[..., torch.Tensor], module: nn.Module, form: ExpertsForm, args: Any, weights: Any, **options: Any
) -> torch.Tensor:
    own: Any = module
    gate = own._apply_gate if form.activation == OWN_GATE else None
    activation = "silu" if gate else form.activation
    options = {**options, "activation": activation, "layout": form.layout, "is_transposed": form.is_transposed}
    return function(*args, *weights, gate=gate, **options)


def _objection_to_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], others: list[tuple[str, type]], chosen: object
) -> str | None:
    """Why a call is none of those that were proved, or None."""
    if len(args) != 3 or kwargs:
        return "called with other arguments than hidden states, indices and weights"
    if not all(isinstance(x, torch.Tensor) and x.dim() == 2 for x in args):
        return "called with tensors that have not two dimensions"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over several devices"
    if _implementation(module) != chosen:
        return f"experts_implementation is {_implementation(module)!r} since"
    if chosen != "grouped_mm" and torch.is_autocast_enabled(args[0].device.type):
        return "autocast rounds what its implementation multiplies"
    if len(module._modules) != len(others) or any(
        type(child := module._modules.get(name)) is not was or (child is not None and has_hooks(child))
        for name, was in others
    ):
        return "a module inside was replaced or given hooks, or its weights are made by an adapter"
    return None


def _call_key(args: tuple[torch.Tensor, ...], weights: Sequence[torch.Tensor | None]) -> CallKey:
    x, _, top_k_weights = args
    first = weights[0]
    own = [weight for weight in weights if weight is not None and type(weight) in (torch.Tensor, nn.Parameter)]
    if first is None or len(own) != len(weights) or any(type(given) is not torch.Tensor for given in args):
        return None, *(type(tensor).__name__ for tensor in (x, first))
    if any(tensor.device != x.device or tensor.dtype != first.dtype for tensor in own):
        return None, "weights of several devices or dtypes"
    return x.device.type, x.dtype, first.dtype, top_k_weights.dtype


def _implementation(module: nn.Module) -> object:
    """What transformers' ExpertsInterface would dispatch to; None outside of it."""
    return getattr(module.config, "_experts_implementation", None) if _is_dispatched(module) else None


def _is_dispatched(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("config", "is_transposed", "has_bias"))


def _probe(module: nn.Module) -> ExpertsForm | str | None:
    """The form of stacked experts, the reason against a module that only looks like it, or None where it is none."""
    shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    forms = list(_possible_forms(shapes))
    if not forms:
        alike = any(_possible_forms({name: (1, *shape[1:]) for name, shape in shapes.items()}))
        return "weights of up and down for different numbers of experts" if alike else None
    if any(True for child in module.children() for _ in child.parameters()):
        return "experts with weights in a module of their own, such as a norm after each expert"
    reference_module = _eager(module)
    found = UNCALLED
    for form in forms:
        weights = _synthetic_weights(form)
        index, routed = _index(form.count), _routed(min(2, form.count))
        clone = functional_copy(reference_module, weights).eval()
        # the others drive activations far out, where a clamp or a nearly-gelu shows
        leaves = [{**weights, **routed, "x": routed["x"] * scale} for scale in (1, 30, 1e4)]
        outputs = [_call(clone, given, index) for given in leaves]
        if any(output is None or output.shape != routed["x"].shape for output in outputs):
            continue
        for candidate in _with_gates(module, form):
            expected = [_definition(module, candidate, given, index) for given in leaves]
            if all_close([output for output in outputs if output is not None], expected, NEAR):
                objection = _objection(reference_module, candidate, leaves[0], index)
                if objection is None:
                    return candidate
                found = objection
        if found is UNCALLED:
            found = f"stacked experts that compute something else than {', '.join(PLAIN)} or their own gate"
    return found


def _objection(
    module: nn.Module, form: ExpertsForm, drawn: Mapping[str, torch.Tensor], index: torch.Tensor
) -> str | None:
    """What is wrong with experts whose values in evaluation are right."""

    def theirs(*leaves: torch.Tensor) -> torch.Tensor:
        given = dict(zip(drawn, leaves, strict=True))
        clone = functional_copy(module, {name: given[name] for name in form.names}).train()
        return clone(given["x"], index, given["top_k_weights"])  # type: ignore[no-any-return]

    def definition(*leaves: torch.Tensor) -> torch.Tensor:
        return _definition(module, form, dict(zip(drawn, leaves, strict=True)), index)

    leaves = tuple(drawn.values())
    exact = NEAR if form.activation == OWN_GATE else EXACT  # it is called, and may round to float32
    if not all_close([theirs(*leaves)], [definition(*leaves)], NEAR):
        return "experts that compute something else in training"
    if not all_close([theirs(*leaves)], [definition(*leaves)], exact):
        return "only nearly experts of that formula, as those that activate in float32 are"
    if not all_close(gradients(theirs, leaves), gradients(definition, leaves), exact):
        return "experts with a gradient of their own"
    return None


def _eager(module: nn.Module) -> nn.Module:
    """The module, or a copy that transformers sends to the module's own forward: grouped products know no float64."""
    if not _is_dispatched(module):
        return module
    config = copy.copy(module.config)
    vars(config)["_experts_implementation_internal"] = "eager"
    clone = functional_copy(module, dict(module._parameters))  # type: ignore[arg-type]
    vars(clone)["config"] = config
    return clone


def _possible_forms(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[ExpertsForm]:
    """Every assignment of the parameters to roles that their shapes allow."""
    stacked = [name for name, shape in shapes.items() if len(shape) == 3]
    biases = [name for name, shape in shapes.items() if len(shape) == 2]
    if len(stacked) != 2 or len(biases) not in (0, 2) or len(stacked) + len(biases) != len(shapes):
        return
    for names in itertools.product(itertools.permutations(stacked), itertools.permutations(biases)):
        (up, down), bias_names = names
        for layout, is_transposed in itertools.product(("gate_up", "plain"), (False, True)):
            form = ExpertsForm(shapes[up][0], "silu", layout, is_transposed, (up, down, *bias_names))
            width, hidden = shapes[up][1:][:: -1 if is_transposed else 1]
            inner = width // 2 if layout == "gate_up" else width
            expected = _shapes(form, hidden, inner)
            if all(shapes[name] == shape for name, shape in expected.items()):
                yield form


def _with_gates(module: nn.Module, form: ExpertsForm) -> Iterator[ExpertsForm]:
    """The form with each gate of ours, then with the module's own."""
    layouts = LAYOUTS if form.layout in LAYOUTS else ("plain",)
    for layout, activation in itertools.product(layouts, PLAIN if form.layout == "plain" else GATED):
        yield ExpertsForm(form.count, activation, layout, form.is_transposed, form.names)
    own = getattr(type(module), "_apply_gate", None)
    if own is not None and form.layout in LAYOUTS:
        attributes = tuple((name, value) for name, value in vars(module).items() if isinstance(value, int | float))
        children = tuple(type(child) for child in module.children())
        key = (own, attributes, children)
        yield ExpertsForm(form.count, OWN_GATE, form.layout, form.is_transposed, form.names, key)


def _shapes(form: ExpertsForm, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters in their roles."""
    width = 2 * inner if form.layout in LAYOUTS else inner
    up, down = (width, hidden), (hidden, inner)
    if form.is_transposed:
        up, down = up[::-1], down[::-1]
    shapes = ((form.count, *up), (form.count, *down), (form.count, width), (form.count, hidden))
    return dict(zip(form.names, shapes, strict=False))


def _synthetic_weights(form: ExpertsForm) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = _shapes(form, HIDDEN, INNER)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * HIDDEN**-0.5
        for name, shape in shapes.items()
    }


def _routed(top_k: int) -> dict[str, torch.Tensor]:
    """Hidden states and the weights of their experts."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64),
        "top_k_weights": torch.rand(TOKENS, top_k, generator=generator, dtype=torch.float64) + 0.1,
    }


def _index(count: int) -> torch.Tensor:
    """Two different experts of each token, one where there is only one; the last of three or more is never chosen."""
    generator = torch.Generator().manual_seed(2)
    chosen = count - 1 if count > 2 else count
    rows = [torch.randperm(chosen, generator=generator)[: min(2, count)] for _ in range(TOKENS)]
    return torch.stack(rows)


def _definition(
    module: nn.Module, form: ExpertsForm, leaves: Mapping[str, torch.Tensor], index: torch.Tensor
) -> torch.Tensor:
    args = (leaves["x"], index, leaves["top_k_weights"])
    return _compute(reference.experts, module, form, args, [leaves[name] for name in form.names])


def _call(module: nn.Module, leaves: Mapping[str, torch.Tensor], index: torch.Tensor) -> torch.Tensor | None:
    try:
        with torch.no_grad():
            output = module(leaves["x"], index, leaves["top_k_weights"])
    except PROBE_ERRORS:
        return None
    return output if isinstance(output, torch.Tensor) else None
