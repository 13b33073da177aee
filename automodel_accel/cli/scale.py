"""automodel-accel plan --mesh: memory and communication of a run on paper, as text or as plain data."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

import automodel_accel
from automodel_accel.kernels.contract import unknown_name
from automodel_accel.parallel.mesh import AXES, DTYPES, Mesh
from automodel_accel.scaling import activations, fitting, memory, traffic, weights
from automodel_accel.scaling.job import SIZES, Job
from automodel_accel.scaling.memory import PARTS, Memory, memory_of
from automodel_accel.scaling.reading import shape_of
from automodel_accel.scaling.shape import Shape
from automodel_accel.scaling.traffic import Flow, flows, seconds, sent_by_axis
from automodel_accel.tables import table

GIB, GB = 2**30, 1e9
TRUTHS = {"true": True, "false": False, "none": None}


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


def mesh_of(texts: Sequence[str]) -> Mesh:
    """A mesh from AXIS=SIZE and other settings of Mesh, separated by commas or spaces; `shard` is 1 unless it is given.

    Raises:
        ValueError: an unknown setting, or a value that there is not.
    """
    known = [field.name for field in fields(Mesh)]
    chosen: dict[str, Any] = {"shard": 1}
    for text in " ".join(texts).replace(",", " ").split():
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--mesh {text}: {unknown_name('setting of Mesh', name, known)}")
        try:
            chosen[name] = TRUTHS[value.lower()] if value.lower() in TRUTHS else int(value)
        except ValueError:
            chosen[name] = value
    if chosen["shard"] == -1:
        raise ValueError("--mesh shard=-1: nothing is running, so there is no number of ranks to fill in; give a size.")
    return Mesh(**chosen)


def bandwidth_of(texts: Sequence[str]) -> dict[str, float]:
    """Axis -> bytes a second, from AXIS=GB.

    Raises:
        ValueError: an unknown axis, or no number above 0.
    """
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in AXES:
            raise ValueError(f"--bandwidth {text}: {unknown_name('axis', name, list(AXES))}")
        if not value.replace(".", "", 1).isdigit() or not float(value) > 0:
            raise ValueError(f"--bandwidth {text}: expected GB a second of one rank, such as {name}=50.")
        found[name] = float(value) * GB
    return found


def prepared(model: nn.Module, dtype: str | None, rank: int | None) -> nn.Module:
    """The model in that dtype, with adapters of that rank on all its linears.

    Raises:
        ValueError: a dtype that there is not, or PEFT refuses the rank.
    """
    if dtype is not None:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype: {unknown_name('dtype', dtype, list(DTYPES))}")
        model = model.to(getattr(torch, dtype))
    if rank is None:
        return model
    from automodel_accel.adapters import with_lora

    return with_lora(model, {"r": rank, "target_modules": "all-linear"})


def answer(model: nn.Module, settings: dict[str, Any], job: dict[str, Any], question: Question) -> Answer:
    """Compute everything.

    Args:
        model: On the meta device, as it would train.
        settings: Of AccelConfig.
        job: Arguments of Job but for fusions and recompute.
        question: What else is asked.

    Raises:
        ValueError: the model is not of a kind that is computed, or the mesh cannot cut it.
    """
    served = automodel_accel.plan(model, settings)
    fused = Job(**job, recompute=served.config.recompute, fusions=frozenset(claim.fusion for claim in served.claims))
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


def text_of(found: Answer) -> str:
    """Tables for the terminal."""
    return "\n".join([_heading(found), _memory_table(found.memory), _traffic_table(found), *_verdict(found)])


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


def explained(found: Answer) -> str:
    """The formulae, and what one layer keeps, term by term."""
    parts = [inspect.getdoc(module) or "" for module in (weights, activations, memory, traffic)]
    layer = max(
        found.shape.layers, key=lambda of: activations.layer_bytes(of, found.shape, found.job, found.job.recompute)
    )
    kept = activations.kept_by(layer, found.shape, found.job, found.job.recompute)
    rows = [(of.what, of.formula, f"{of.bytes:,.0f}") for of in kept]
    rows.append(("sum", "", f"{sum(of.bytes for of in kept):,.0f}"))
    letters = (
        f"H = {found.shape.hidden}, Q = {layer.query}, K = {layer.key}, V = {layer.value}, O = {layer.output}, A = {layer.heads}, "
        f"F = {layer.mlp}, E = {layer.experts}, k = {layer.chosen}, G = {layer.expert}, b = {found.shape.itemsize}, "
        f"r = {layer.rank_attention + layer.rank_mlp}, T = {found.job.mesh.tensor}, N = {found.job.tokens}, "
        f"L = {len(found.shape.layers)}, m = {found.job.accumulate}"
    )
    return "\n\n".join([*parts, table("Kept by a layer, bytes per token", ("what", "formula", "bytes"), rows), letters])


def said(job: Job) -> str:
    """The mesh and what is computed again, as options of the command."""
    axes = [f"{axis}={size}" for axis, size in zip(AXES, job.mesh.sizes, strict=True) if size != 1]
    mesh = ",".join(axes) or "shard=1"
    return f"--mesh {mesh}" + (f" --recompute {job.recompute}" if job.recompute else "")


def _heading(found: Answer) -> str:
    job, shape = found.job, found.shape
    trained = sum(torch.Size(weight.shape).numel() for weight in shape.weights if weight.trains)
    lines = [
        f"{shape.name}: {shape.parameters / 1e9:.2f} billion parameters, {trained / 1e9:.3f} of which train, on {job.gpus} GPUs: "
        f"{said(job).removeprefix('--mesh ')}",
        f"{job.rows} x {job.length} tokens in a micro-batch of a data rank, {job.step_tokens:,} in a step of all; {job.optimizer}; "
        f"fused: {', '.join(sorted(job.fusions)) or 'nothing'}",
    ]
    return "\n".join(lines) + "\n"


def _memory_table(found: Memory) -> str:
    parts = [part for part in PARTS if any(part in phase.bytes for phase in found.phases)]
    rows = [(part, *(_gib(phase.bytes.get(part, 0.0)) for phase in found.phases)) for part in parts]
    rows.append(("sum", *(_gib(phase.total) for phase in found.phases)))
    header = ("part", *(phase.name for phase in found.phases))
    host = f"In the memory of the host, for each GPU: {_gib(found.host)} GiB\n" if found.host else ""
    return table("Memory of one GPU in GiB, phase by phase", header, rows) + host


def _traffic_table(found: Answer) -> str:
    if not found.flows:
        return "One GPU: nothing travels.\n"
    took = seconds(sent_by_axis(list(found.flows)), found.question.bandwidth)
    rows = []
    for flow in found.flows:
        time = f"{flow.sent / found.question.bandwidth[flow.axis]:.3f}" if flow.axis in took else ""
        rows.append((flow.axis, flow.what, flow.collective, str(flow.ranks), f"{flow.sent / GB:.2f}", time))
    header = ("axis", "what", "collective", "ranks", "GB sent", "seconds")
    title = "What one GPU sends in a step" + ("; times without any overlap" if took else "")
    width = len(header) if took else len(header) - 1
    return table(title, header[:width], [row[:width] for row in rows])


def _verdict(found: Answer) -> list[str]:
    peak, plain, question = found.memory.peak, found.plain.peak, found.question
    lines = [
        f"Peak: {_gib(peak.total)} GiB ({peak.name}); plain transformers on this mesh: {_gib(plain.total)} GiB ({plain.name})."
    ]
    lines += [f"Not counted: {note}." for note in found.shape.notes]
    if question.gib is None:
        return lines
    room = f"{question.gib:g} GiB, {question.reserve:.0%} of which are left for what is not counted"
    if found.fits:
        return [*lines, f"It fits on GPUs of {room}."]
    remedy = f"this would: {said(found.other)} ({found.other.gpus} GPUs)" if found.other else "nor does any mesh tried"
    return [*lines, f"It does not fit on GPUs of {room}; {remedy}."]


def _flow_data(flow: Flow) -> dict[str, Any]:
    return {
        "axis": flow.axis,
        "what": flow.what,
        "collective": flow.collective,
        "ranks": flow.ranks,
        "whole_bytes": flow.whole,
        "sent_bytes": flow.sent,
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size else ""
