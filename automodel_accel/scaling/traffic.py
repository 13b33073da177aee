"""Bytes that one rank sends in an optimizer step, by axis of the mesh. B is the whole that is gathered or summed, n the ranks.

    all-gather, reduce-scatter      B (n - 1) / n
    all-reduce                      2 B (n - 1) / n              a reduce-scatter and an all-gather

of a ring, which is the least that any algorithm sends (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", 2009; nccl-tests, PERFORMANCE.md). m micro-batches, N tokens of a rank, L layers, b bytes of an element:

    shard       parameters: all-gather of each unit, in forward and, where it was freed, in backward     m (1 or 2) P
                gradients: reduce-scatter, in the last micro-batch (or in each)                          (1 or m) G
    replicate   gradients: all-reduce of what a rank of `shard` holds; without `shard`, of all (DDP)     G / S
    tensor      input and output of attention and of MLP: all-reduce, one in forward, one in backward    m 4 L N H b
                with sequence parallel an all-gather and a reduce-scatter; and both ends of the layers, 2 N H b
                embedding: all-reduce of its output; head: all-reduce of its input's gradient            m 2 N H b
                loss: all-gather of five float32 numbers of each token                                   m T N 20
    context     keys and values: all-gather in forward, reduce-scatter of their gradients                m 2 L N C (K + V) b

Without expert parallelism, experts travel as parameters do, whether a token is sent to them or not.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from automodel_accel.parallel.wrap import HEAD, LAYER
from automodel_accel.scaling.job import Job
from automodel_accel.scaling.shape import ROOT, Layer, Shape
from automodel_accel.scaling.weights import elements, gathered_bytes, reduced_bytes, reduced_size, units

LOSS_STATISTICS = 5 * 4  # bytes a token of one rank: kernels/linear_cross_entropy/shard.py


@dataclass(frozen=True, slots=True)
class Flow:
    """What travels along an axis for one purpose.

    Attributes:
        axis: Of the mesh; "shard" stands for shard and context together where both cut parameters.
        what: In words.
        collective: "all-gather", "reduce-scatter" or "all-reduce".
        whole: Bytes of all that is gathered or summed in a step.
        ranks: Over how many.
    """

    axis: str
    what: str
    collective: str
    whole: float
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that one rank sends, and receives, in a step."""
        return (2 if self.collective == "all-reduce" else 1) * self.whole * (self.ranks - 1) / self.ranks


def flows(shape: Shape, job: Job) -> list[Flow]:
    """All that travels in a step; what needs no second rank is left out."""
    found = [*_data(shape, job), *_tensor(shape, job), *_context(shape, job)]
    return [flow for flow in found if flow.ranks > 1 and flow.whole]


def sent_by_axis(found: list[Flow]) -> dict[str, float]:
    """Axis -> bytes that one rank sends in a step."""
    return {
        axis: sum(flow.sent for flow in found if flow.axis == axis) for axis in dict.fromkeys(f.axis for f in found)
    }


def seconds(sent: Mapping[str, float], bandwidth: Mapping[str, float]) -> dict[str, float]:
    """Axis -> seconds, for the axes whose bandwidth in bytes a second is given; nothing overlaps in them."""
    return {axis: of / bandwidth[axis] for axis, of in sent.items() if axis in bandwidth}


def _data(shape: Shape, job: Job) -> list[Flow]:
    trained = [weight for weight in shape.weights if weight.trains]
    sums = job.accumulate if job.sync == "every" else 1
    if not job.gathers:
        whole = sum(elements(weight, job) * weight.itemsize for weight in trained)
        return [Flow("replicate", "gradients (DDP)", "all-reduce", sums * whole, job.mesh.replicate)]
    forward = backward = 0
    for (kind, _), weights in units(shape).items():
        size = gathered_bytes(weights, job)
        forward += size
        backward += size if job.mesh.reshard and kind not in (ROOT, HEAD) else 0
    m, shards = job.accumulate, job.shards
    part = sum(elements(weight, job) * reduced_size(weight, job) for weight in trained)
    return [
        Flow("shard", "parameters, forward", "all-gather", m * forward, shards),
        Flow("shard", "parameters, backward", "all-gather", m * backward, shards),
        Flow("shard", "gradients", "reduce-scatter", sums * reduced_bytes(trained, job), shards),
        Flow("replicate", "gradients (HSDP)", "all-reduce", sums * part, job.mesh.replicate),
    ]


def _tensor(shape: Shape, job: Job) -> list[Flow]:
    tensor, m = job.mesh.tensor, job.accumulate
    stream = job.tokens * shape.hidden * shape.itemsize
    layers = sum(bool(layer.query) + bool(layer.mlp or layer.experts) for layer in shape.layers)
    again = _computed_again(shape.layers, job)
    of_layers = m * stream * (2 * layers + again)
    return [
        *(Flow("tensor", f"{where} of attention and MLP", name, of_layers, tensor) for where, name in _ways(job)),
        Flow("tensor", "embedding", "all-reduce", m * stream, tensor),
        Flow("tensor", "gradient of the head's input", "all-reduce", m * stream, tensor),
        Flow("tensor", "statistics of the loss", "all-gather", m * tensor * job.tokens * LOSS_STATISTICS, tensor),
        *(_ends(shape, job, stream) if job.mesh.sequence_parallel else ()),
    ]


def _ends(shape: Shape, job: Job, stream: float) -> list[Flow]:
    """What sequence parallel adds: the first layer's input and the last one's output, and weights that see a part of the tokens."""
    whole = [weight for weight in shape.weights if weight.kind == LAYER and weight.cut is None and weight.trains]
    norms = sum(math.prod(weight.shape) * weight.itemsize for weight in whole)
    return [
        Flow("tensor", "hidden states at both ends", "all-gather", job.accumulate * 2 * stream, job.mesh.tensor),
        Flow("tensor", "gradients of norms", "all-reduce", job.accumulate * norms, job.mesh.tensor),
    ]


def _ways(job: Job) -> list[tuple[str, str]]:
    if not job.mesh.sequence_parallel:
        return [("outputs, and gradients of inputs,", "all-reduce")]
    return [
        ("inputs, and gradients of outputs,", "all-gather"),
        ("outputs, and gradients of inputs,", "reduce-scatter"),
    ]


def _computed_again(layers: tuple[Layer, ...], job: Job) -> int:
    """Sums over the ranks that a backward computes a second time."""
    if job.recompute == "full":
        return sum(bool(layer.query) + bool(layer.mlp or layer.experts) for layer in layers)
    return 0


def _context(shape: Shape, job: Job) -> list[Flow]:
    context, m = job.mesh.context, job.accumulate
    widths = sum(layer.key + layer.value for layer in shape.layers)
    whole = m * job.tokens * context * widths * shape.itemsize / job.mesh.tensor
    again = 2 if job.recompute == "full" else 1
    return [
        Flow("context", "keys and values", "all-gather", again * whole, context),
        Flow("context", "their gradients", "reduce-scatter", whole, context),
    ]
