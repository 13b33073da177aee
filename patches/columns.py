"""Columns beside the frozen weights of LoRA layers (kernels/lora/extension.py): when they are made, and when they are taken back.

They are made in the first training call, not by `apply`: only then is it known that nobody (FSDP2, a move to another device, a
loader) has put other parameters in the place of those that were there. They go before anybody reads a state_dict, so that this
holds the parameters themselves, contiguous, as ever, and come back with the next training call; `revert` takes them back for good.
A weight is moved alone, so that the memory of one is all that is needed on top.
"""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.lora import Adapter
from automodel_accel.kernels.lora.extension import Extension, can_extend, contract, extend, padded
from automodel_accel.patches.retype import RESTORE, restore, retype

RECORD = "_accel_columns"  # on the linears


@dataclass(slots=True)
class Record:
    """Of one linear.

    Attributes:
        weight: The parameter that was there at `apply`.
        extension: The columns beside it, where there are some.
    """

    weight: weakref.ref[torch.Tensor]
    extension: Extension | None = None


def allow(layer: Any, owner: object) -> None:
    """Let the linear of a LoRA layer have columns, where its weight is a frozen parameter now."""
    base = layer.base_layer
    if type(base.weight) is not nn.Parameter or base.weight.requires_grad:
        return
    save = type(base)._save_to_state_dict

    @functools.wraps(save)
    def save_contracted(self: Any, *args: Any, **kwargs: Any) -> Any:
        _take_back(self)
        return save(self, *args, **kwargs)

    retype(base, {"_save_to_state_dict": save_contracted, RESTORE: _take_back}, owner)
    vars(base)[RECORD] = Record(weakref.ref(base.weight))


def disallow(layer: Any) -> None:
    """Undo `allow`."""
    restore(layer.base_layer)


def is_allowed(layer: Any) -> bool:
    """Whether there may be columns."""
    return RECORD in vars(layer.base_layer)


def has_columns(layer: Any) -> bool:
    """Whether there are columns now."""
    record = vars(layer.base_layer).get(RECORD)
    return record is not None and record.extension is not None


def width(layer: Any) -> int:
    """Columns that the adapters of a layer need at most."""
    return max((padded(a.weight.shape[0]) for a in layer.lora_A.values()), default=0)


def with_columns(bases: Sequence[Any], adapters: Sequence[Adapter | None]) -> list[Adapter | None]:
    """The adapters of linears of one input, with the columns beside their weights, which are made where they can be."""
    found = [(base, one) for base, one in zip(bases, adapters, strict=True) if one is not None]
    records: list[Any] = [vars(base).get(RECORD) for base, _ in found]
    if any(
        record is None or record.weight() is not base.weight for record, (base, _) in zip(records, found, strict=True)
    ):
        return list(adapters)
    widths = [padded(one.a_RH.shape[0]) for _, one in found]
    if all(can_extend(base.weight) for base, _ in found):
        for i, (record, (base, _)) in enumerate(zip(records, found, strict=True)):
            record.extension = extend(base.weight, sum(widths), sum(widths[:i]))
    extensions = iter(record.extension for record in records)
    return [one and Adapter(one.a_RH, one.b_FR, one.form, next(extensions)) for one in adapters]


def _take_back(base: Any) -> None:
    record = vars(base).get(RECORD)
    if record is None or record.extension is None:
        return
    if record.extension.wide(base.weight) is not None:
        contract(base.weight)
    record.extension = None
