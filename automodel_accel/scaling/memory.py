"""Bytes on one GPU in each phase of a step; the largest is what must fit.

    parameters, optimizer states    always there
    gradients                       one layer after the other in backward; all from then on, so always if micro-batches are accumulated
    activations                     N (2 b H + sum over layers)                           N tokens of a rank in a micro-batch
    gathered                        units that stay gathered (root; head until its backward), a layer, and `prefetch` more
    summed                          gradients of a unit, whole, in the gathered dtype, and a copy in the reduced dtype, which lives on
                                    in the backward of the next unit
    accumulated                     whole gradients between micro-batches, where ranks sum only in the last one
    loss                            one chunk of logits, and the head's gradient; or N V (b + 8) of plain transformers: logits, their
                                    log-softmax in float32, and its gradient
    work                            N times the gradients of activations of a layer, and what is computed again
    update                          one tensor of the size of the parameters that train, of AdamW's foreach loop

Not counted: the CUDA context, buffers of NCCL, fragments of the allocator, masks and position tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from automodel_accel.kernels.linear_cross_entropy.chunks import chunk_rows
from automodel_accel.parallel.wrap import EMBEDDING, HEAD, LAYER
from automodel_accel.scaling.activations import again_bytes, layer_bytes, model_bytes, working_bytes
from automodel_accel.scaling.job import Job
from automodel_accel.scaling.shape import ROOT, Shape, Weight
from automodel_accel.scaling.weights import (
    cut,
    gathered_bytes,
    gradient_bytes,
    optimizer_bytes,
    parameter_bytes,
    reduced_bytes,
    units,
)

PARTS = (
    *("parameters", "gradients", "optimizer", "activations"),
    *("gathered", "summed", "accumulated", "loss", "work", "update"),
)


ON_HOST = ("parameters", "gradients", "optimizer")  # where they are offloaded


@dataclass(frozen=True, slots=True)
class Phase:
    """A moment of a step.

    Attributes:
        name: In words.
        bytes: Part -> bytes on the GPU; parts of nothing left out.
    """

    name: str
    bytes: Mapping[str, float]

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.bytes.values())


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one GPU.

    Attributes:
        phases: In the order of a step.
        host: Bytes in the memory of the host, for one rank.
    """

    phases: tuple[Phase, ...]
    host: float

    @property
    def peak(self) -> Phase:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: phase.total)


def memory_of(shape: Shape, job: Job) -> Memory:
    """What one GPU holds, phase by phase."""
    parameters, gradients, states = (of(shape, job) for of in (parameter_bytes, gradient_bytes, optimizer_bytes))
    whole = _accumulated(shape, job)
    always = {"parameters": parameters, "optimizer": states}
    computing = {**always, "accumulated": whole, "gradients": gradients if job.accumulate > 1 and not whole else 0.0}
    tokens, unit = job.tokens, _units(shape, job)
    activations = model_bytes(shape, job) * tokens
    of_layer = max(layer_bytes(layer, shape, job, job.recompute) for layer in shape.layers) * tokens
    work = (working_bytes(shape, job) + again_bytes(shape, job)) * tokens
    ahead = job.mesh.prefetch * unit.layer
    phases = {
        "loss": {"activations": activations, "gathered": unit.root + unit.head, "loss": _loss(shape, job)},
        "backward of the head": {
            "activations": activations,
            "gathered": unit.root + unit.head + ahead,
            "summed": unit.head_gradient + unit.head_sum,
        },
        "backward of the last layer": {
            "activations": activations,
            "gathered": unit.root + unit.layer + ahead,
            "summed": unit.layer_gradient + max(unit.head_sum, unit.layer_sum),
            "work": work,
        },
        "backward of the first layer": {
            "gradients": gradients,
            "activations": of_layer,
            "gathered": unit.root + unit.layer + unit.embedding,
            "summed": unit.layer_gradient + unit.layer_sum,
            "work": work,
        },
    }
    made = [_phase(name, {**computing, **parts}, job) for name, parts in phases.items()]
    if job.mesh.offload:
        return Memory(tuple(made), parameters + gradients + states)
    update = gradients if job.optimizer == "adamw" else 0.0
    return Memory((*made, _phase("update", {**always, "gradients": gradients, "update": update}, job)), 0.0)


def _phase(name: str, parts: dict[str, float], job: Job) -> Phase:
    gone = ON_HOST if job.mesh.offload else ()
    return Phase(name, {part: parts[part] for part in PARTS if parts.get(part) and part not in gone})


@dataclass(frozen=True, slots=True)
class _Units:
    """Bytes of what FSDP2 gathers and sums at once: `_gradient` in the gathered dtype, `_sum` in the reduced one; 0 without FSDP2."""

    root: float = 0.0
    embedding: float = 0.0
    head: float = 0.0
    layer: float = 0.0
    head_gradient: float = 0.0
    head_sum: float = 0.0
    layer_gradient: float = 0.0
    layer_sum: float = 0.0


def _units(shape: Shape, job: Job) -> _Units:
    if not job.gathers:
        return _Units()
    of: dict[str, list[list[Weight]]] = {kind: [] for kind in (ROOT, EMBEDDING, HEAD, LAYER)}
    for (kind, _), weights in units(shape).items():
        of[kind].append(weights)
    gathered = {kind: [gathered_bytes(weights, job) for weights in groups] for kind, groups in of.items()}
    trained = {kind: [[w for w in weights if w.trains] for weights in groups] for kind, groups in of.items()}
    # freed at the end of backward only
    root = sum(gathered[ROOT]) + (0 if job.mesh.reshard else sum(gathered[LAYER]) + sum(gathered[EMBEDDING]))
    return _Units(
        root=root,
        embedding=max(gathered[EMBEDDING], default=0.0) if job.mesh.reshard else 0.0,
        head=max(gathered[HEAD], default=0.0),
        layer=max(gathered[LAYER]) if job.mesh.reshard else 0.0,
        head_gradient=max((gathered_bytes(weights, job) for weights in trained[HEAD]), default=0.0),
        head_sum=max((reduced_bytes(weights, job) for weights in trained[HEAD]), default=0.0),
        layer_gradient=max(gathered_bytes(weights, job) for weights in trained[LAYER]),
        layer_sum=max(reduced_bytes(weights, job) for weights in trained[LAYER]),
    )


def _accumulated(shape: Shape, job: Job) -> float:
    if job.accumulate == 1 or job.sync == "every" or not job.gathers:
        return 0.0
    return reduced_bytes(shape.weights, job)


def _loss(shape: Shape, job: Job) -> float:
    """Logits, and the head's gradient, which the fused loss has in forward."""
    tokens, b = job.tokens, shape.itemsize
    if "loss" not in job.fusions:
        return tokens * shape.vocab * (b + 8.0)
    vocab = cut(shape.vocab, job.mesh.tensor)
    dtype = torch.bfloat16 if b == 2 else torch.float32
    chunk = chunk_rows(tokens, vocab, torch.empty(0, dtype=dtype, device="meta"), None)
    return chunk * (vocab + shape.hidden) * b + (vocab * shape.hidden * b if shape.head_trains else 0.0)
