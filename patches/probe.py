"""Numeric probes: copies of a module with small synthetic CPU weights, and keys under which their findings are cached.

A probe never touches the model's own tensors or hooks, so it works on meta, sharded, quantised and GPU models alike. Probes and
proofs run in `undisturbed()`.
"""

import copy
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from automodel_accel.kernels.contract import Refusal
from automodel_accel.patches.retype import changed_by_accelerator, forward_replaced

Form = TypeVar("Form")

# what code may raise when it is called with an input, or with missing tensors, that it was not written for
PROBE_ERRORS = (
    *(TypeError, ValueError, RuntimeError, AttributeError, LookupError),
    *(AssertionError, ArithmeticError, ImportError, NameError, StopIteration),
)

_RECORDS = (list, dict, set, deque)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}  # hooks and the like: no part of what a module computes
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@contextmanager
def undisturbed(device: str) -> Iterator[None]:
    """Inside, torch's modes and defaults are its own, whatever the caller has set; afterwards, no random number was drawn."""
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {"cpu", device}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float32)
        yield


def functional_copy(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], children: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    """A module of the same class and attributes with these tensors and children in place of its own.

    It runs its class's forward: without hooks, without a forward set on the instance, uncompiled. Lists, dicts and sets among
    its attributes are copies, so that a forward which keeps records does not write into the original's.

    Args:
        module: Left untouched.
        tensors: Own parameters and buffers by name (no dots); those not named stay absent.
        children: Direct children by name; those not named are copied, with the tensors they have.
    """
    clone: nn.Module = object.__new__(type(module))
    attributes = {
        name: copy.copy(value) if isinstance(value, _RECORDS) else value for name, value in vars(module).items()
    }
    attributes.pop("forward", None)
    vars(clone).update(attributes, _compiled_call_impl=None, **{name: OrderedDict() for name in _HOOKS})
    vars(clone)["_parameters"] = {name: tensors.get(name) for name in module._parameters}
    vars(clone)["_buffers"] = {name: tensors.get(name) for name in module._buffers}
    vars(clone)["_modules"] = {
        name: (children or {}).get(name) or functional_copy(child, dict(_own_tensors(child)))
        for name, child in module._modules.items()
        if child is not None
    }
    return clone


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear with these tensors, [out, in] and [out] or None, as its own."""
    linear = nn.Linear.__new__(nn.Linear)  # without drawing weights
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    # plain attributes, not Parameters: they may be autograd leaves that a probe or an experiment made
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear


def structure_key(module: nn.Module) -> Hashable:
    """Equal for modules that compute the same function up to the values of their tensors."""
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in _own_tensors(module))
    attributes = tuple(
        (name, _identity(value)) for name, value in sorted(vars(module).items()) if name not in _OF_EVERY_MODULE
    )
    children = tuple((name, structure_key(child)) for name, child in module.named_children())
    return type(module), shapes, attributes, children


def recognise(
    path: str, module: nn.Module, findings: dict[Hashable, Any], probe: Callable[[], Form | str | None]
) -> Form | Refusal | None:
    """What `probe` finds in a candidate: its form, the reason against it as a refusal, or None where it is no place at all.

    The probe runs once for all modules of one structure; not at all where another accelerator's kernels would run in it.
    """
    other = changed_by_accelerator(path, module)
    if other is not None:
        return other if any(True for _ in module.parameters()) else None
    key = structure_key(module)
    if key not in findings:
        findings[key] = probe()
    found: Form | str | None = findings[key]
    if found is None:
        return None
    if (replaced := forward_replaced(path, module)) is not None:
        return replaced
    return Refusal(path, found, "the original forward stays") if isinstance(found, str) else found


def call(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor | None:
    """The module's output without gradients, or None where it does not take these inputs or returns no single tensor."""
    try:
        with torch.no_grad():
            output = module(*inputs)
    except PROBE_ERRORS:
        return None
    return output if isinstance(output, torch.Tensor) else None


def gradients(function: Callable[..., torch.Tensor], leaves: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """The gradient of each leaf, zero where it gets none, for one incoming gradient; None where there is none at all."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    try:
        y = function(*leaves)
        grad_y = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        return list(torch.autograd.grad(y, leaves, grad_y, allow_unused=True, materialize_grads=True))
    except PROBE_ERRORS:
        return None


def all_close(found: Sequence[torch.Tensor] | None, expected: Sequence[torch.Tensor] | None, tolerance: float) -> bool:
    """Whether each tensor is as expected, within `tolerance` of its largest element."""
    return (found is None) == (expected is None) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance * b.abs().max().item())
        for a, b in zip(found or (), expected or (), strict=True)
    )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, tensor) for name, tensor in module._parameters.items() if tensor is not None)
    yield from ((name, tensor) for name, tensor in module._buffers.items() if tensor is not None)


def _identity(value: object) -> Hashable:
    if isinstance(value, bool | int | float | str | None):
        return None if value is None else (type(value), value)
    if isinstance(value, tuple):
        return tuple(map(_identity, value))
    return id(value)
