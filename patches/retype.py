"""Swap the behaviour of one module instance by giving it a subclass of its own class, and take it back.

The instance stays the same object with the same parameters, buffers, hooks, names and `isinstance`; its class keeps its name,
so config.json, FSDP wrapping policies and `_init_weights` see what they saw. A deep copy stays swapped and can be reverted on
its own. A pickle holds the original class, so that it loads where this package is not installed.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from automodel_accel.kernels.contract import Refusal
from automodel_accel.patches.quirks import OTHER_ACCELERATORS

MODEL = "the model"  # the place whose dotted name is empty
INSTANCE_STATE = "_accel_"  # prefix of attributes that a swapped forward may set on its instance
RESTORE = "_accel_restore"  # a method that undoes what a swap did beside
BEFORE_COPY = "_accel_before_copy"  # a method to be called before the instance is copied or pickled


class Retyped(type):
    """Of the classes that `retype` makes: whoever asks for instances of one means those of the class it was made from.

    accelerate takes the class of the first layer, and shards what is an instance of it.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        base = vars(cls).get("_accel_base")
        if base is None:  # a wrapper's own class, derived from ours
            return super().__instancecheck__(instance)
        while "_accel_base" in vars(base):
            base = vars(base)["_accel_base"]
        return isinstance(instance, base)


def retype(module: nn.Module, methods: Mapping[str, Callable[..., Any]], owner: object) -> None:
    """Give `module` a subclass of its class with these methods; `owner` (the report) can be found from it again.

    A module may be re-typed more than once: a later method wraps the `type(module).method` that it finds.
    """
    base = type(module)
    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_accel_base": base,
        "_accel_owner": owner,
        **_copying(original_class(module)),
        **methods,
    }
    kind: Any = type(base)
    module.__class__ = _metaclass_for(kind)(base.__name__, (base,), members)


@functools.cache
def _metaclass_for(kind: Any) -> Any:
    """`Retyped`, together with the metaclass that a module's class has of its own."""
    if issubclass(kind, Retyped) or kind is type:
        return kind if kind is not type else Retyped
    return type("Retyped", (Retyped, kind), {})


def is_retyped(module: nn.Module) -> bool:
    """Whether this very class is one that `retype` made."""
    return "_accel_base" in vars(type(module))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class before any `retype`, or the class as it is."""
    found: type[nn.Module] = type(module)
    while "_accel_base" in vars(found):
        found = vars(found)["_accel_base"]
    return found


def owner_of(module: nn.Module) -> Any:
    """What was given to `retype` as owner, or None; also found under a wrapper that derives from our class, such as FSDP2's."""
    return getattr(type(module), "_accel_owner", None)


def restore(module: nn.Module) -> None:
    """Give the module its original class back, however often it was re-typed."""
    if is_retyped(module):
        if (undo := getattr(type(module), RESTORE, None)) is not None:
            undo(module)
        module.__class__ = original_class(module)
        for name in [name for name in vars(module) if name.startswith(INSTANCE_STATE)]:
            delattr(module, name)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or has_backward_hooks(module)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see the gradient of the module's output or inputs."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def accelerator_of(function: Callable[..., Any]) -> str | None:
    """The other accelerator that a function comes from, or None."""
    return OTHER_ACCELERATORS.get(_package_of(function))


def changed_by_accelerator(path: str, module: nn.Module) -> Refusal | None:
    """Say so when the module's class or forward comes from another accelerator."""
    of_class = OTHER_ACCELERATORS.get(type(module).__module__.split(".")[0])
    other = accelerator_of(_forward_of(module)) or of_class
    if other is None:
        return None
    return Refusal(
        path or MODEL, f"already changed by {other}", f"{other}'s forward stays; load the model without it to use ours"
    )


def forward_replaced(path: str, module: nn.Module) -> Refusal | None:
    """Say so when a forward was set on the instance: ours would have no effect, or undo it."""
    if "forward" not in vars(module):
        return None
    return Refusal(
        path or MODEL,
        f"forward was replaced on the instance by {_package_of(_forward_of(module)) or 'somebody'}",
        "that forward stays; apply before it is replaced (accelerate's device hooks, kernelize)",
    )


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    found: Callable[..., Any] = vars(module).get("forward", type(module).forward)
    return found


def _package_of(function: Callable[..., Any]) -> str:
    function = getattr(function, "__func__", function)
    function = getattr(function, "func", function)  # of a partial, such as accelerate's
    return (getattr(function, "__module__", None) or "").split(".")[0]


class _New:
    """Makes an instance of a re-typed class in this process, and of the original class where a pickle is loaded."""

    def __init__(self, retyped: type[nn.Module], original: type[nn.Module]) -> None:
        self.retyped, self.original = retyped, original

    def __call__(self) -> nn.Module:
        return object.__new__(self.retyped)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (object.__new__, self.original)


def _copying(original: type[nn.Module]) -> dict[str, Callable[..., Any]]:

    # no __deepcopy__: PEFT's wrappers answer every attribute of the model in them, and would be copied as that model
    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        if (before := getattr(type(self), BEFORE_COPY, None)) is not None:
            before(self)
        reduced: Any = original.__reduce_ex__(self, max(protocol, 2))
        state = reduced[2]
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if not name.startswith(INSTANCE_STATE)}
        return _New(type(self), original), (), state

    return {"__reduce_ex__": reduce}
