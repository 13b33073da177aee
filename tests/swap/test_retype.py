"""A module that is re-typed more than once: the later forward wraps the earlier, and all of it comes off, copies and pickles too."""

import copy
import pickle
from typing import Any

import torch
from torch import nn

from automodel_accel.patches.retype import is_retyped, original_class, owner_of, restore, retype


def _twice() -> nn.Linear:
    linear = nn.Linear(2, 2)
    for offset in (1.0, 10.0):
        inner = type(linear).forward

        def forward(self: nn.Module, x: torch.Tensor, inner: Any = inner, offset: float = offset) -> torch.Tensor:
            return inner(self, x) + offset  # type: ignore[no-any-return]

        retype(linear, {"forward": forward}, owner=offset)
    return linear


def test_the_later_forward_wraps_the_earlier() -> None:
    linear, x = _twice(), torch.randn(3, 2)
    assert torch.equal(linear(x), nn.Linear.forward(linear, x) + 1.0 + 10.0)
    assert owner_of(linear) == 10.0
    assert original_class(linear) is nn.Linear
    assert type(linear).__name__ == "Linear"


def test_restore_takes_all_off() -> None:
    linear = _twice()
    restore(linear)
    assert type(linear) is nn.Linear
    assert not is_retyped(linear)


def test_a_deep_copy_keeps_both_and_is_restored_alone() -> None:
    linear, x = _twice(), torch.randn(3, 2)
    clone = copy.deepcopy(linear)
    assert torch.equal(clone(x), linear(x))
    restore(clone)
    assert type(clone) is nn.Linear
    assert is_retyped(linear)


def test_a_pickle_holds_the_original_class() -> None:
    loaded = pickle.loads(pickle.dumps(_twice()))
    assert type(loaded) is nn.Linear


def test_a_wrapper_that_answers_its_models_attributes_is_copied_as_itself() -> None:
    """As PEFT's models do."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    clone = copy.deepcopy(Wrapper(_twice()))
    assert type(clone) is Wrapper
    assert is_retyped(clone.inner)


def test_instances_of_a_class_are_those_of_the_original() -> None:
    """accelerate shards the layers that are instances of the first one's class."""
    first, second, other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Bilinear(2, 2, 2)
    retype(first, {"forward": nn.Linear.forward}, None)
    retype(first, {"forward": nn.Linear.forward}, None)
    untouched = nn.Linear(2, 2)
    retype(second, {"forward": nn.Linear.forward}, None)
    assert all(isinstance(module, type(first)) for module in (first, second, untouched))
    assert not isinstance(other, type(first))
    assert not issubclass(type(second), type(first))
    wrapper = type("Wrapper", (type(first),), {})
    assert not isinstance(second, wrapper)


class Meta(type):
    pass


class OfMeta(nn.Linear, metaclass=Meta):
    pass


def test_a_class_with_a_metaclass_of_its_own() -> None:
    module = OfMeta(2, 2)
    retype(module, {"forward": OfMeta.forward}, None)
    assert isinstance(type(module), Meta)
    assert isinstance(OfMeta(2, 2), type(module))
    assert module(torch.ones(1, 2)).shape == (1, 2)
