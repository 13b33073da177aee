"""All figures of one run on paper: what one GPU holds and sends, whether it fits, and what would."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from automodel_accel.parallel.mesh import AXES
from automodel_accel.plan import Plan
from automodel_accel.scaling import fitting
from automodel_accel.scaling.job import SIZES, Job
from automodel_accel.scaling.memory import Memory, memory_of
from automodel_accel.scaling.reading import shape_of
from automodel_accel.scaling.shape import Shape
from automodel_accel.scaling.traffic import Flow, flows, seconds, sent_by_axis

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of one run, beside the run itself.

    Attributes:
        gib: Memory of one GPU; None where nobody asked whether it fits.
        reserve: Share of it that is left for what is not counted.
        bandwidth: Axis -> bytes a second that one rank sends.
    """

    gib: float | None
    reserve: float
    bandwidth: dict[str, float]

    @property
    def room(self) -> float | None:
        """Bytes of a GPU that may be used."""
        return None if self.gib is None else self.gib * GIB * (1 - self.reserve)


@dataclass(frozen=True, slots=True)
class Answer:
    """All figures of one run."""

    shape: Shape
    job: Job
    question: Question
    memory: Memory
    plain: Memory
    flows: Sequence[Flow]
    other: Job | None

    @property
    def fits(self) -> bool | None:
        """None where nobody asked."""
        return None if self.question.room is None else self.memory.peak.total <= self.question.room


def answer(model: nn.Module, served: Plan | None, job: dict[str, Any], question: Question) -> Answer:
    """Compute everything.

    Args:
        model: On the meta device, as it would train.
        served: What apply would do to it; None for plain transformers.
        job: Arguments of Job but for fusions and recompute.
        question: What else is asked.

    Raises:
        ValueError: the model is not of a kind that is computed, or the mesh cannot cut it.
    """
    recompute = None if served is None else served.config.recompute
    claims = () if served is None else served.claims
    fused = Job(**job, recompute=recompute, fusions=frozenset(claim.fusion for claim in claims))
    full = "full" if fused.recompute == "full" else None  # which plain transformers has too
    plain = Job(**job, recompute=full, fusions=frozenset())
    shape = shape_of(model)
    if fused.gathers and fused.mesh.param_dtype is not None:  # what FSDP2 gathers is what is computed with
        shape = replace(shape, itemsize=SIZES[fused.mesh.param_dtype])
    fitting.check(shape, fused)
    found = memory_of(shape, fused)
    room = question.room
    other = fitting.first_that_fits(shape, fused, room) if room is not None and found.peak.total > room else None
    return Answer(shape, fused, question, found, memory_of(shape, plain), flows(shape, fused), other)


def data_of(found: Answer) -> dict[str, Any]:
    """Plain data, in bytes and seconds."""
    sent = sent_by_axis(list(found.flows))
    return {
        "model": found.shape.name,
        "parameters": found.shape.parameters,
        "gpus": found.job.gpus,
        "mesh": dict(zip(AXES, found.job.mesh.sizes, strict=True)),
        "tokens_per_step": found.job.step_tokens,
        "recompute": found.job.recompute,
        "fusions": sorted(found.job.fusions),
        "phases": [{"name": phase.name, "bytes": dict(phase.bytes)} for phase in found.memory.phases],
        "peak_bytes": found.memory.peak.total,
        "peak_bytes_of_plain_transformers": found.plain.peak.total,
        "host_bytes": found.memory.host,
        "traffic": [_flow_data(flow) for flow in found.flows],
        "sent_bytes": sent,
        "seconds": seconds(sent, found.question.bandwidth),
        "fits": found.fits,
        "would_fit": None if found.other is None else said(found.other),
        "notes": list(found.shape.notes),
    }


def said(job: Job) -> str:
    """The mesh and what is computed again, as options of the command."""
    axes = [f"{axis}={size}" for axis, size in zip(AXES, job.mesh.sizes, strict=True) if size != 1]
    mesh = ",".join(axes) or "shard=1"
    return f"--mesh {mesh}" + (f" --recompute {job.recompute}" if job.recompute else "")


def _flow_data(flow: Flow) -> dict[str, Any]:
    return {
        "axis": flow.axis,
        "what": flow.what,
        "collective": flow.collective,
        "ranks": flow.ranks,
        "whole_bytes": flow.whole,
        "sent_bytes": flow.sent,
    }
