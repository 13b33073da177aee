"""The 8-bit cast of weights, made once for as long as they stay as they are.

Weights that train are cast again after each step of an optimizer, whatever the number of micro-batches; frozen ones once. What has
changed is seen by the tensors' versions and addresses; by the steps of any optimizer, for some write through pointers, which leaves no
version to see (bitsandbytes); and by gradients that were given and cleared since, for others write to `.data`.
"""

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from automodel_accel.kernels.fp8_linear.casts import Cast


class _Steps:
    """How many steps optimizers have taken in this process since the first cast."""

    def __init__(self) -> None:
        self.count = 0
        self._handle: Any = None

    def watch(self) -> None:
        """From now on; once."""
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.count += 1


STEPS = _Steps()


class HeldCast:
    """The cast of some weights, as they were when it was made.

    Attributes:
        cast: The cast, or None before there was one.
        passed: Whether a backward has given gradients of these weights since it was made.
    """

    def __init__(self) -> None:
        self.passed = False
        self._key: tuple[Any, ...] = ()
        self._weights: list[weakref.ref[torch.Tensor]] = []
        self.cast: Cast | None = None

    def of(self, weights: Sequence[torch.Tensor], key: tuple[Any, ...], make: Callable[[], Cast]) -> Cast:
        """The cast of these weights under this key (format, kind of scale): the one at hand, or a new one."""
        key = (*key, *map(_state, weights))
        same = [weight() for weight in self._weights]
        cleared = self.passed and any(weight.requires_grad and weight.grad is None for weight in weights)
        if self.cast is None or cleared or key != self._key or any(map(operator.is_not, same, weights)):
            self.cast, self.passed = make(), False
            self._key, self._weights = key, [weakref.ref(weight) for weight in weights]
        return self.cast


def _state(weight: torch.Tensor) -> tuple[Any, ...]:
    if not weight.requires_grad:
        return weight.data_ptr(), weight._version
    STEPS.watch()
    return weight.data_ptr(), weight._version, STEPS.count
