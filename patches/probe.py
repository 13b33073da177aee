"""Numeric probes: copies of a module with small synthetic CPU weights, and keys under which their findings are cached.

A probe never touches the model's own tensors or hooks, so it works on meta, sharded, quantised and GPU models alike.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

# what code may raise when it is called with an input that it was not written for
PROBE_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, ArithmeticError, ImportError)

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def functional_copy(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], children: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    """A module of the same class and attributes with these tensors and children in place of its own, and without hooks.

    Args:
        module: Left untouched.
        tensors: Own parameters and buffers by name (no dots); those not named stay absent.
        children: Direct children by name; those not named are copied, with the tensors they have.
    """
    clone: nn.Module = object.__new__(type(module))
    vars(clone).update(vars(module))
    vars(clone).update({name: OrderedDict() for name in _HOOKS})
    vars(clone)["_parameters"] = {name: tensors.get(name) for name in module._parameters}
    vars(clone)["_buffers"] = {name: tensors.get(name) for name in module._buffers}
    vars(clone)["_modules"] = {
        name: (children or {}).get(name) or functional_copy(child, dict(_own_tensors(child)))
        for name, child in module._modules.items()
        if child is not None
    }
    return clone


def structure_key(module: nn.Module) -> Hashable:
    """Equal for modules that compute the same function up to the values of their tensors."""
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in _own_tensors(module))
    attributes = tuple((name, _identity(value)) for name, value in sorted(vars(module).items()) if name[0] != "_")
    children = tuple((name, structure_key(child)) for name, child in module.named_children())
    return type(module), shapes, attributes, children


def cached(cache: dict[Hashable, Any], key: Hashable, find: Callable[[], Any]) -> Any:
    """`cache[key]`, found on the first use."""
    if key not in cache:
        cache[key] = find()
    return cache[key]


def call(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor | None:
    """The module's output without gradients, or None where it does not take these inputs or returns no single tensor."""
    try:
        with torch.no_grad():
            output = module(*inputs)
    except PROBE_ERRORS:
        return None
    return output if isinstance(output, torch.Tensor) else None


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, tensor) for name, tensor in module._parameters.items() if tensor is not None)
    yield from ((name, tensor) for name, tensor in module._buffers.items() if tensor is not None)


def _identity(value: object) -> Hashable:
    if isinstance(value, bool | int | float | str | None):
        return None if value is None else (type(value), value)
    return id(value)
