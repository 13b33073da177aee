"""automodel-accel plan --mesh: memory and communication of a run on paper, as text or as plain data."""

import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.contract import unknown_name
from automodel_accel.parallel.mesh import AXES, DTYPES, Mesh
from automodel_accel.scaling import activations, memory, traffic, weights
from automodel_accel.scaling.answers import GIB, Answer, Question, answer, data_of, said
from automodel_accel.scaling.memory import PARTS, Memory
from automodel_accel.scaling.traffic import seconds, sent_by_axis
from automodel_accel.tables import table

__all__ = ["Question", "answer", "bandwidth_of", "data_of", "explained", "mesh_of", "prepared", "text_of"]

GB = 1e9
TRUTHS = {"true": True, "false": False, "none": None}


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


def text_of(found: Answer) -> str:
    """Tables for the terminal."""
    return "\n".join([_heading(found), _memory_table(found.memory), _traffic_table(found), *_verdict(found)])


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


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size else ""
