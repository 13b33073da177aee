"""Residual sum and norm in one kernel, inside one layer.

A layer is a module that owns at least one norm and at least one branch: a child with parameters that is no norm, linear,
embedding or convolution. (One with a list of modules is a stack of layers.) While the layer's forward runs in training, calls of
its branches and norms return `LazySum`s, and a norm that is called with a sum which nobody has looked at yet computes both. The
layer itself takes and returns tensors, so that checkpointing, sharding and hooks on it see what they saw. No forward is copied.
"""

import dis
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.layer_norm import KERNEL as LAYER_NORM_KERNEL
from automodel_accel.kernels.layer_norm import SUMS as LAYER_SUMS
from automodel_accel.kernels.layer_norm import add_layer_norm
from automodel_accel.kernels.recompute import region, remember
from automodel_accel.kernels.rms_norm import ADD_KERNEL, add_rms_norm
from automodel_accel.kernels.rms_norm.through import rms_norm_through
from automodel_accel.patches.contract import NOTHING, Beside, CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.lazy_sum import LazySum, lazy, tensor, tensors
from automodel_accel.patches.norm import computation
from automodel_accel.patches.norm_probe import WEIGHTLESS_SIZE, NormForm, recognise_norm
from automodel_accel.patches.probe import functional_copy
from automodel_accel.patches.retype import changed_by_accelerator, forward_replaced, has_hooks, original_class, retype

FLAG = "_accel_in_layer"  # on branches and norms: what is `Here` while their layer's forward runs, else None
LOW_PRECISION = (torch.bfloat16, torch.float16)
SCALES = (1.0, 0.3)  # of the branch; both are proved at once
KERNELS = {"rms": ADD_KERNEL, "layer": LAYER_NORM_KERNEL}


@dataclass(frozen=True, slots=True)
class LayerForm:
    """What was recognised.

    Attributes:
        norms: (name of the child, its form).
        branches: Names of children.
    """

    norms: tuple[tuple[str, NormForm], ...]
    branches: tuple[str, ...]

    def kinds(self) -> list[NormForm]:
        """The forms of norms, each once; calls are proved for each."""
        return list(dict.fromkeys(form for _, form in self.norms))

    def label(self) -> str:
        """For the plan."""
        kinds = dict.fromkeys(f"{form.kind}_norm {form.size or 'of any size'}" for form in self.kinds())
        return f"residual sums before {', '.join(kinds)}"


class Here:
    """One run of a layer's forward: where it runs, and what its norms handed on of their inputs (kernels/rms_norm/through.py)."""

    def __init__(self, region: Any) -> None:
        self.region = region
        self._handed_on: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def hand_on(self, x: torch.Tensor, through: torch.Tensor) -> None:
        """`through` has the value of x, and a gradient that meets the norm's."""
        self._handed_on[id(x)] = x, x._version, through

    def instead_of(self, x: torch.Tensor) -> torch.Tensor:
        """What was handed on of this very tensor, if it was not written to since; else the tensor."""
        known, version, through = self._handed_on.get(id(x), (None, 0, x))
        return through if known is x and version == x._version else x


class ResidualPatch:
    """Matches, proves and swaps layers."""

    fusion = "residual"
    kernel = ADD_KERNEL

    def __init__(self) -> None:
        self._found: dict[Hashable, object] = {}
        self._paths: dict[int, str] = {}

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """Recognise a layer; None for anything else."""
        if path == "":
            self._paths = {id(child): name for name, child in module.named_modules()}
        if any(isinstance(child, nn.ModuleList) for child in module.children()):
            return None  # a stack of layers
        norms, branches = self._children(path, module)
        if not norms or not branches:
            return None
        objection = changed_by_accelerator(path, module) or forward_replaced(path, module)
        if objection is not None:
            return objection
        form = LayerForm(tuple(norms.items()), branches)
        dtype = _dtype(module, form)
        first = form.kinds()[0]
        features = frozenset({LAYER_SUMS} if first.kind == "layer" else ())
        choices = context.choices(KERNELS[first.kind], dtype, first.size or 1, features)
        taken = [self._paths[id(module._modules[name])] for name in (*branches, *norms)]
        paths = (*dict.fromkeys(taken), path)
        return Claim(self.fusion, paths, form.label(), dtype, form, choices, part="residual")

    def _children(self, path: str, module: nn.Module) -> tuple[dict[str, NormForm], tuple[str, ...]]:
        norms: dict[str, NormForm] = {}
        branches = []
        for name, child in module.named_children():
            found = recognise_norm(f"{path}.{name}" if path else name, child, self._found)
            if isinstance(found, NormForm):
                if found.kind in KERNELS:
                    norms[name] = found
            elif _is_branch(child):
                branches.append(name)
        return norms, tuple(branches)

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """Native dtype first; then mixed precision, for each kind of norm in the layer.

        (number of the kind, device, dtype of the branch, of the residual, of the norm's weight, autocast)
        """
        form: LayerForm = claim.form  # type: ignore[assignment]
        native, wide = claim.dtype, torch.float32
        low = native if native in LOW_PRECISION else torch.bfloat16
        plain = [(native, native, native), (low, low, low), (wide, wide, wide), (low, low, wide)]
        mixed = [(low, wide, wide), (low, wide, low)]
        calls = [(*dtypes, False) for dtypes in plain] + [(*dtypes, True) for dtypes in (*plain, *mixed)]
        if native is torch.float64:
            calls = calls[:1]
        return [(kind, device, *call) for kind in range(len(form.kinds())) for call in dict.fromkeys(calls)]

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """Sum and norm of rows of several scales, through torch and the original norm, and through lazy sums and the swapped one."""
        form: LayerForm = claim.form  # type: ignore[assignment]
        number, device, x_dtype, residual_dtype, *_, autocast = key
        weight_dtype: torch.dtype = key[4]
        kind = form.kinds()[number]
        norm = module._modules[next(name for name, other in form.norms if other == kind)]
        assert norm is not None

        def both(
            leaves: Mapping[str, torch.Tensor], run: Callable[[Any], Any], branch: Any, alone: Callable[[Any], Any]
        ) -> torch.Tensor:
            sums = [leaves["residual"] + (branch if scale == 1.0 else branch * scale) for scale in SCALES]
            pairs = [(run(h), h) for h in sums]
            if kind.kind == "rms" and x_dtype == residual_dtype:  # else no norm takes a tensor by this call
                pairs.append(alone(leaves["residual"]))
            return torch.cat([tensor(value).flatten() for pair in pairs for value in pair])

        def ours(leaves: Mapping[str, torch.Tensor]) -> torch.Tensor:
            copy, counts = functional_copy(norm, _parameters(kind, leaves)), Counts()
            retype(
                copy, {"__call__": _norm_call(type(copy).__call__, number, kind, {key: implementation}, counts)}, None
            )
            here = Here(None)

            def alone(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return _norm_through(copy, kind, x, here, implementation, NOTHING), here.instead_of(x)

            output = both(leaves, copy, LazySum(leaves["x"]), alone)
            if counts.fused[self.fusion] != len(SCALES):
                raise RuntimeError(f"the swapped norm did not take the fused path: {dict(counts.passed_on)}")
            return output

        def plain(leaves: Mapping[str, torch.Tensor], run: Callable[[Any], Any]) -> torch.Tensor:
            return both(leaves, run, leaves["x"], lambda x: (run(x), x))

        return Experiment(
            inputs={name: drawn.to(device) for name, drawn in _draw(kind).items()},
            dtypes={**dict.fromkeys(kind.parameters, weight_dtype), "x": x_dtype, "residual": residual_dtype},
            theirs=lambda leaves: plain(leaves, functional_copy(norm, _parameters(kind, leaves))),
            ours=ours,
            truth=lambda leaves: plain(leaves, lambda h: kind.definition()(h, *_parameters(kind, leaves).values())),
            autocast=(x_dtype if x_dtype in LOW_PRECISION else torch.bfloat16) if autocast else None,
        )

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type branches, norms and the layer."""
        form: LayerForm = claim.form  # type: ignore[assignment]
        layer = modules[-1]
        children = [layer._modules[name] for name in form.branches]
        for child in dict.fromkeys(filter(None, children)):
            retype(child, {"__call__": _branch_call(type(child).__call__)}, counts)
        for name, kind in form.norms:
            norm = layer._modules[name]
            assert norm is not None
            call = _norm_call(type(norm).__call__, form.kinds().index(kind), kind, proven, counts)
            retype(norm, {"__call__": call}, counts)
        retype(
            layer, {"forward": _layer_forward(type(layer).forward, form, _writes_in_place(type(layer)), counts)}, counts
        )


def _layer_forward(original: Callable[..., Any], form: LayerForm, writes: bool, counts: Counts) -> Callable[..., Any]:
    """`writes`: whether the layer's own code writes in place. Eagerly that is seen where it happens, and obeyed; torch.compile
    takes `lazy += x` for `lazy = lazy + x`, and does not tell when a tensor was written to."""
    ours = (*form.branches, *dict(form.norms))

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training or not torch.is_grad_enabled() or (torch.compiler.is_compiling() and writes):
            return original(self, *args, **kwargs)
        children = [child for child in map(self._modules.get, ours) if child is not None]
        if any(has_hooks(child) for name, child in self._modules.items() if child is not None and name not in ours):
            counts.count(counts.passed_on, "residual: a child of the layer has hooks, which need tensors")
            return original(self, *args, **kwargs)
        here = Here(region())
        for child in children:
            setattr(child, FLAG, here)
        try:
            return tensors(original(self, *args, **kwargs))
        finally:
            for child in children:
                setattr(child, FLAG, None)

    return forward


def _branch_call(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around everything that a call of the module does, its hooks and checkpointing too: these see tensors."""

    @functools.wraps(original)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *map(tensor, args), **{name: tensor(value) for name, value in kwargs.items()})
        if not _is_in_layer(self):
            return output
        if type(output) is tuple and output:
            return lazy(output[0]), *output[1:]
        return lazy(output)

    return __call__


def _is_in_layer(child: nn.Module) -> bool:
    """Whether the child was called by the layer itself, and not again by a checkpoint inside of the layer."""
    here: Here | None = getattr(child, FLAG, None)
    return here is not None and here.region == region()


def _norm_call(
    original: Callable[..., Any], number: int, form: NormForm, proven: Proven, counts: Counts
) -> Callable[..., Any]:
    branch_call = _branch_call(original)

    @functools.wraps(original)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], LazySum):
            found = None if len(args) != 1 or kwargs else _norm_and_input(self, number, form, args[0], proven, counts)
            return branch_call(self, *args, **kwargs) if found is None else lazy(found)
        parts = args[0].parts
        if parts is None:
            return branch_call(self, args[0].tensor)
        implementation = _proven_for(self, number, form, parts, proven, counts)
        if implementation is None:
            return branch_call(self, args[0].tensor)
        counts.count(counts.fused, ResidualPatch.fusion)
        here: Here | None = getattr(self, FLAG, None)
        if here is not None:
            parts = parts[0], here.instead_of(parts[1]), parts[2]
        y, h = _sum_and_norm(self, form, parts, implementation, counts.beside(parts[0].shape[-1]))
        args[0].settle(h)
        return lazy(y) if _is_in_layer(self) else y

    return __call__


def _norm_and_input(
    norm: nn.Module, number: int, form: NormForm, x: Any, proven: Proven, counts: Counts
) -> torch.Tensor | None:
    """The norm of a tensor that the layer may add to a branch later; None where only the norm itself can be right."""
    if form.kind != "rms" or type(x) is not torch.Tensor or not x.requires_grad or torch.compiler.is_compiling():
        return None
    by_kernel = type(norm).forward is not original_class(norm).forward
    if not by_kernel or not _is_in_layer(norm) or _is_watched(norm):
        return None
    implementation = proven.get((number, *_call_key(norm, form, x, x, 1.0)))
    if implementation is None:
        return None
    counts.count(counts.fused, "norm")
    return _norm_through(norm, form, x, getattr(norm, FLAG), implementation, counts.beside(x.shape[-1]))


def _is_watched(norm: nn.Module) -> bool:
    """Whether calling the norm does something else than its class's forward."""
    return has_hooks(norm) or "forward" in vars(norm)


def _norm_through(
    norm: nn.Module, form: NormForm, x: torch.Tensor, here: Here, implementation: str, beside: Beside
) -> torch.Tensor:
    weight = getattr(norm, form.weight) if form.weight else None
    eps = getattr(norm, form.eps_name) if form.eps_name else form.eps
    options: dict[str, Any] = {"offset": form.offset, "order": form.order, "implementation": implementation}
    y: torch.Tensor
    y, through = beside.made_by(rms_norm_through, x, weight, eps, **options)
    again = computation(form)
    remember(y, lambda x, weight: again(x, weight, None, eps, implementation), x, weight)
    here.hand_on(x, through)
    return y


def _proven_for(
    norm: nn.Module,
    number: int,
    form: NormForm,
    parts: tuple[torch.Tensor, torch.Tensor, float],
    proven: Proven,
    counts: Counts,
) -> str | None:
    """The implementation for this call, or None, counted."""
    if _is_watched(norm):
        counts.count(counts.passed_on, "residual: the norm has hooks, or a forward of its own")
        return None
    if not torch.is_grad_enabled():
        counts.count(counts.passed_on, "residual: the norm runs without gradients, the sum does not")
        return None
    key = (number, *_call_key(norm, form, *parts))
    if key not in proven:
        counts.count(counts.passed_on, f"residual: not proved for {key}")
    return proven.get(key)


def _call_key(norm: nn.Module, form: NormForm, branch: torch.Tensor, residual: torch.Tensor, scale: float) -> CallKey:
    """What decides whether a call was proved; None for a norm whose parameters are not plain vectors of fitting size."""
    device = branch.device
    parameters = [getattr(norm, name) for name in form.parameters]
    for parameter in parameters:
        if type(parameter) not in (nn.Parameter, torch.Tensor) or parameter.shape != branch.shape[-1:]:
            return (None, type(parameter).__name__)
        if parameter.device != device or parameter.dtype != parameters[0].dtype:
            return (None, "parameters apart")
    if form.size not in (None, branch.shape[-1]):
        return (None, "size")
    # without a weight the dtype of the sum stands for its dtype
    dtype = parameters[0].dtype if parameters else residual.dtype
    return device.type, branch.dtype, residual.dtype, dtype, torch.is_autocast_enabled(device.type)


def _sum_and_norm(
    norm: nn.Module,
    form: NormForm,
    parts: tuple[torch.Tensor, torch.Tensor, float],
    implementation: str,
    beside: Beside,
) -> tuple[torch.Tensor, torch.Tensor]:
    branch, residual, scale = parts
    weight = getattr(norm, form.weight) if form.weight else None
    bias = getattr(norm, form.bias) if form.bias else None
    eps = getattr(norm, form.eps_name) if form.eps_name else form.eps
    options: dict[str, Any] = {
        "offset": form.offset,
        "order": form.order,
        "scale": scale,
        "implementation": implementation,
    }
    if form.kind == "layer":
        y, h = beside.made_by(add_layer_norm, branch, residual, weight, bias, eps, **options)
    else:
        y, h = beside.made_by(add_rms_norm, branch, residual, weight, eps, **options)
    again = computation(form)
    remember(y, lambda *saved: again(*saved, eps, implementation), h, weight, bias)
    return y, h


def _writes_in_place(layer: type[nn.Module]) -> bool:
    """Whether any code of the class, above torch's own, has an augmented assignment, an item assignment or a method like `add_`."""
    above = [cls for cls in layer.__mro__ if cls not in nn.Module.__mro__ and "_accel_base" not in vars(cls)]
    functions = [inspect.unwrap(member) for cls in above for member in vars(cls).values() if inspect.isfunction(member)]
    return any(_code_writes(function.__code__) for function in functions)


def _code_writes(code: CodeType) -> bool:
    for step in dis.get_instructions(code):
        augmented = step.opname.startswith("INPLACE_") or (step.opname == "BINARY_OP" and step.argrepr.endswith("="))
        method = isinstance(step.argval, str) and step.argval.endswith("_") and not step.argval.endswith("__")
        if augmented or step.opname == "STORE_SUBSCR" or (method and step.opname in ("LOAD_ATTR", "LOAD_METHOD")):
            return True
    return any(_code_writes(inner) for inner in code.co_consts if isinstance(inner, CodeType))


def _is_branch(child: nn.Module) -> bool:
    if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.ParameterList) or isinstance(
        getattr(child, "in_features", None), int
    ):
        return False
    leaf = not any(True for _ in child.children())
    # a matrix of its own and no children: a linear, an embedding or a convolution, of any class
    dims = [parameter.dim() for parameter in child.parameters(recurse=not leaf)]
    return bool(dims) and not (leaf and max(dims) > 1)


def _dtype(layer: nn.Module, form: LayerForm) -> torch.dtype:
    """Dtype of the first norm's weight, else of the layer's first floating point parameter."""
    name, first = form.norms[0]
    own: Iterator[torch.Tensor] = (getattr(layer._modules[name], parameter) for parameter in first.parameters)
    found = (parameter.dtype for parameters in (own, layer.parameters()) for parameter in parameters)
    usable = (dtype for dtype in found if dtype.is_floating_point and dtype.itemsize >= 2)
    return next(usable, torch.get_default_dtype())


def _parameters(form: NormForm, leaves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: leaves[name] for name in form.parameters}


def _draw(form: NormForm) -> dict[str, torch.Tensor]:
    """Rows of several scales, and parameters, in float64."""
    generator = torch.Generator().manual_seed(0)
    size = form.size or WEIGHTLESS_SIZE
    drawn = {name: torch.randn(2, 3, size, generator=generator, dtype=torch.float64) for name in ("x", "residual")}
    for rows in drawn.values():
        rows[0] *= 1e-2
    for name in form.parameters:
        offset = form.offset if name == form.weight else 0.0
        drawn[name] = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5 - offset
    return drawn
