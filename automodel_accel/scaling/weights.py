"""Bytes of parameters, gradients and optimizer states on one rank, and of what FSDP2 gathers.

    cut(d, n) = ceil(d / n)                     torch.chunk: the first ranks have full parts
    part      = cut(d_tensor, T) in the dimension that tensor ranks cut, cut(d_0, S C) in the first one, all other dimensions whole
    states    = parameters: sum of part b;  gradients: the same where it trains;  AdamW: twice that

FSDP2 pads the first dimension to a multiple of its ranks, so that is what a rank holds. Sources: Rajbhandari et al., "ZeRO", 2020,
section 5 (states of Adam over N ranks); torch.distributed.fsdp.fully_shard (padding; units).
"""

import math
from collections.abc import Iterable

from automodel_accel.scaling.job import OPTIMIZERS, SIZES, Job
from automodel_accel.scaling.shape import Shape, Weight


def cut(size: int, ranks: int) -> int:
    """The largest part of `size` on one of the ranks."""
    return -(-size // ranks)


def on_tensor_rank(weight: Weight, job: Job) -> tuple[int, ...]:
    """Its shape on one tensor rank, whole over the data ranks."""
    shape = list(weight.shape)
    if weight.cut is not None:
        shape[weight.cut] = cut(shape[weight.cut], job.mesh.tensor)
    return tuple(shape)


def elements(weight: Weight, job: Job) -> int:
    """Of the part that one rank holds."""
    shape = on_tensor_rank(weight, job)
    return math.prod((cut(shape[0], job.shards), *shape[1:])) if shape else 1


def parameter_bytes(shape: Shape, job: Job) -> int:
    """On one rank, at rest."""
    return sum(elements(weight, job) * weight.itemsize for weight in shape.weights)


def gradient_bytes(shape: Shape, job: Job) -> int:
    """On one rank, once all micro-batches are done: in the dtype of the parameters."""
    return sum(elements(weight, job) * weight.itemsize for weight in shape.weights if weight.trains)


def optimizer_bytes(shape: Shape, job: Job) -> int:
    """On one rank: so many states of the shape and dtype of each parameter that trains."""
    return OPTIMIZERS[job.optimizer] * gradient_bytes(shape, job)


def gathered_size(weight: Weight, job: Job) -> int:
    """Bytes of an element while FSDP2 has gathered it."""
    dtype = job.mesh.param_dtype
    return weight.itemsize if dtype is None else SIZES[dtype]


def reduced_size(weight: Weight, job: Job) -> int:
    """Bytes of an element of a gradient while FSDP2 sums it."""
    dtype = job.mesh.reduce_dtype
    return gathered_size(weight, job) if dtype is None else SIZES[dtype]


def gathered_bytes(weights: Iterable[Weight], job: Job) -> int:
    """What FSDP2 gathers for these weights: the padded whole of what a tensor rank holds."""
    return sum(elements(weight, job) * job.shards * gathered_size(weight, job) for weight in weights)


def reduced_bytes(weights: Iterable[Weight], job: Job) -> int:
    """What FSDP2 sums of the gradients of these weights: padded, whole."""
    return sum(elements(weight, job) * job.shards * reduced_size(weight, job) for weight in weights if weight.trains)


def units(shape: Shape) -> dict[tuple[str, str], list[Weight]]:
    """(kind, path) -> the weights that FSDP2 gathers together."""
    found: dict[tuple[str, str], list[Weight]] = {}
    for weight in shape.weights:
        found.setdefault((weight.kind, weight.unit), []).append(weight)
    return found
