"""A frozen base in 8 bits: one byte a weight on the device, under adapters that train.

From the first training call on, the weights of frozen linears are there as their cast alone (rows of one tensor for linears of one
input). The parameters themselves move to host memory, bit by bit as they were; in their place on the module is a parameter of the
same object, shape, dtype and device whose elements are all one NaN: who reads it without asking sees that at once. They come back
before anybody is known to read them: a merge, a move, a deep copy, a loaded state_dict, `revert`. A state_dict holds the host's.
Everything that then computes with such a linear, evaluation included, does so in 8 bits, as adapters are trained beside that.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.fp8_linear import Recipe, fp8_linears
from automodel_accel.kernels.fp8_linear.casts import Cast
from automodel_accel.kernels.fp8_linear.weights import HeldCast
from automodel_accel.patches.retype import BEFORE_COPY, RESTORE, retype

RECORD = "_accel_base8"  # on the linears


@dataclass(slots=True)
class Record:
    """Of one linear.

    Attributes:
        weight: The parameter that was there at `apply`.
        host: Its values, while they are not on the module.
        joined: The cast of the weights of its group, while it is there in its place.
        own: The rows of it that are this linear's.
    """

    weight: weakref.ref[torch.Tensor]
    host: torch.Tensor | None = None
    joined: Cast | None = None
    own: Cast | None = None


class _Ready(HeldCast):
    """A cast that needs no weights."""

    def __init__(self, cast: Cast) -> None:
        super().__init__()
        self.cast = cast

    def of(self, weights: Sequence[torch.Tensor], key: tuple[Any, ...], make: Callable[[], Cast]) -> Cast:
        """The cast."""
        assert self.cast is not None
        return self.cast


def allow(base: Any, recipe: Recipe, owner: object) -> None:
    """Let a linear be there in 8 bits alone, where its weight is a frozen parameter now."""
    if type(base.weight) is not nn.Parameter or base.weight.requires_grad:
        return
    methods: dict[str, Callable[..., Any]] = {
        "forward": _forward(type(base).forward, recipe),
        "_save_to_state_dict": _saving(type(base)._save_to_state_dict),
        RESTORE: put_back,
        BEFORE_COPY: put_back,
    }
    for name in ("_load_from_state_dict", "_apply"):
        methods[name] = _after_putting_back(getattr(type(base), name))
    retype(base, methods, owner)
    vars(base)[RECORD] = Record(weakref.ref(base.weight))


def is_allowed(base: Any) -> bool:
    """Whether the linear may be there in 8 bits alone."""
    return RECORD in vars(base)


def is_released(base: Any) -> bool:
    """Whether it is."""
    record = vars(base).get(RECORD)
    return record is not None and record.host is not None


def held(bases: Sequence[Any]) -> HeldCast | None:
    """The cast of these linears together, where their weights are not there; None where they are."""
    records = [vars(base).get(RECORD) for base in bases]
    first = records[0]
    if first is not None and first.joined is not None and not any(base.weight.requires_grad for base in bases):
        if len(bases) == 1 and first.own is not None:
            return _Ready(first.own)
        rows = sum(len(base.weight) for base in bases)
        if len(first.joined.q) == rows and all(one is not None and one.joined is first.joined for one in records):
            return _Ready(first.joined)
    for base in bases:
        put_back(base)
    return None


def release(bases: Sequence[Any], cast: Cast | None) -> bool:
    """Move the weights of linears that were just computed together to the host, where each of them may; whether they went."""
    if cast is None or cast.q is None or cast.q_t is not None or not all(map(_may_go, bases)):
        return False
    rows = 0
    for base in bases:
        record, weight = vars(base)[RECORD], base.weight
        count = weight.shape[0]
        scale = cast.scale[rows : rows + count] if cast.scale.dim() else cast.scale
        record.joined, record.own = cast, Cast(cast.q[rows : rows + count], None, scale)
        record.host = weight.data.to("cpu")
        weight.data = torch.full((1, 1), float("nan"), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        rows += count
    return True


def put_back(base: Any) -> None:
    """Have the weight on the module again."""
    record = vars(base).get(RECORD)
    if record is None or record.host is None:
        return
    base.weight.data = record.host.to(base.weight.device)
    record.host = record.joined = record.own = None


def _may_go(base: Any) -> bool:
    record = vars(base).get(RECORD)
    if record is None or record.host is not None or base.weight is not record.weight():
        return False
    return type(base.weight) is nn.Parameter and not base.weight.requires_grad


def _forward(original: Callable[..., Any], recipe: Recipe) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = vars(self).get(RECORD)
        if record is None or record.own is None:
            return original(self, *args, **kwargs)
        (x,) = args
        (output,) = fp8_linears(x, [self.weight], [self.bias], recipe, held=_Ready(record.own))
        return output

    return forward


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        original(self, destination, prefix, keep_vars)
        if is_released(self):
            destination[f"{prefix}weight"] = vars(self)[RECORD].host

    return save


def _after_putting_back(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        put_back(self)
        return original(self, *args, **kwargs)

    return method
