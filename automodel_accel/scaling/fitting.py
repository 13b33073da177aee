"""Which change makes a run fit: recompute first, then tensor ranks, then more GPUs."""

from collections.abc import Iterator
from dataclasses import replace

from automodel_accel.scaling.job import Job
from automodel_accel.scaling.memory import memory_of
from automodel_accel.scaling.shape import Shape

RECOMPUTES = (None, "selective", "mlp", "full")  # from the fastest to the leanest
MOST_TENSOR = 8  # GPUs that are joined by fast links, on most nodes
MOST_GROWTH = 64


def check(shape: Shape, job: Job) -> None:
    """Whether the model can be cut so.

    Raises:
        ValueError: tensor ranks do not divide the heads.
    """
    if (why := _objection(shape, job.mesh.tensor)) is not None:
        raise ValueError(why)


def fits(shape: Shape, job: Job, room: float) -> bool:
    """Whether the peak is within `room` bytes."""
    return memory_of(shape, job).peak.total <= room


def first_that_fits(shape: Shape, job: Job, room: float) -> Job | None:
    """The smallest change of `job` that fits into `room` bytes a GPU; None where none was found.

    The global batch grows with the ranks; rows of a rank stay as they are.
    """
    return next((other for other in _others(shape, job) if fits(shape, other, room)), None)


def _others(shape: Shape, job: Job) -> Iterator[Job]:
    """From the smallest change to the largest: as many GPUs, then twice as many, ..."""
    leaner = RECOMPUTES[RECOMPUTES.index(job.recompute) :]
    growth = 1
    while growth <= MOST_GROWTH:
        for tensor in _tensors(shape, job, growth):
            ranks = job.gpus * growth
            shard = ranks // (job.mesh.replicate * job.mesh.context * tensor)
            mesh = replace(job.mesh, shard=shard, tensor=tensor)
            yield from (replace(job, mesh=mesh, recompute=recompute) for recompute in leaner)
        growth *= 2


def _tensors(shape: Shape, job: Job, growth: int) -> Iterator[int]:
    tensor = job.mesh.tensor
    while tensor <= max(MOST_TENSOR, job.mesh.tensor):
        others = job.mesh.replicate * job.mesh.context * tensor
        if job.gpus * growth % others == 0 and _objection(shape, tensor) is None:
            yield tensor
        tensor *= 2


def _objection(shape: Shape, tensor: int) -> str | None:
    for layer in shape.layers:
        if layer.query and (layer.kv_heads % tensor or layer.heads % tensor):
            return (
                f"{shape.name}: {layer.heads} heads, {layer.kv_heads} of keys and values, cannot be cut over {tensor} tensor ranks; "
                "expected a tensor size that divides both."
            )
    return None
