"""What a run would be, line by line: each in words, and as plain data."""

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from automodel_accel.data import open_data
from automodel_accel.data.settings import BinData, MockData
from automodel_accel.freezing import summary
from automodel_accel.parallel.mesh import AXES, Mesh
from automodel_accel.plan import Plan
from automodel_accel.recipes.findings import place_of
from automodel_accel.recipes.loading import dtype_of
from automodel_accel.recipes.recipe import Recipe
from automodel_accel.recipes.running import CHECKPOINTS, MODEL
from automodel_accel.recipes.trial import Trial
from automodel_accel.scaling.answers import GIB, Answer, data_of, said
from automodel_accel.tables import WIDTH

_ADAPTER = re.compile(r"\.(lora_|modules_to_save\.)")
SMALLEST_SHOWN = 0.05  # GiB


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that the run would be.

    Attributes:
        name: Of what.
        said: In words.
        data: The same as plain data.
    """

    name: str
    said: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Steps:
    """How many optimizer steps there are.

    Attributes:
        count: None where only the data says.
        of_epoch: Steps of an epoch; None where only the data says.
    """

    count: int | None
    of_epoch: int | None = None


def model_line(recipe: Recipe, model: nn.Module, trial: Trial | None) -> Line:
    """Class, type, size, dtype, and where it comes from."""
    inner = _inner(model)
    total = sum(one.numel() for name, one in model.named_parameters() if not _ADAPTER.search(name))
    dtype = str(dtype_of(recipe.model)).removeprefix("torch.")
    kind = inner.config.model_type
    if trial is not None:
        source = f"a tiny one for {recipe.model.path}, whose type {trial.found.where} says"
    else:
        source = f"{recipe.model.path}, {recipe.model.weights} weights"
    rounded = f", rounded to {recipe.model.quantize}" if recipe.model.quantize else ""
    data = {"class": type(inner).__name__, "type": kind, "parameters": total, "dtype": dtype, "tiny": trial is not None}
    text = f"{type(inner).__name__} ({kind}), {count(total)} parameters in {dtype}{rounded}\n{source}"
    return Line("model", text, {**data, "path": recipe.model.path, "weights": recipe.model.weights})


def trained_line(recipe: Recipe, model: nn.Module) -> Line:
    """Which parameters train, of all."""
    found = summary(model)
    adapters = sum(hasattr(module, "lora_A") for module in model.modules())
    every, trained = _with_adapters(model)
    lora = recipe.lora
    how = "all of it" if lora is None else f"LoRA of rank {lora.r}, alpha {lora.lora_alpha:g}, on {adapters} modules"
    if lora is None and recipe.model.freeze.parts():
        how = "without what is frozen"
    frozen = f"\nfrozen: {', '.join(recipe.model.freeze.parts())}" if recipe.model.freeze.parts() else ""
    text = f"{count(trained)} parameters, {trained / every:.2%}: {how}{frozen}"
    by_part = {name: {"trained": one.trainable, "all": one.total} for name, one in found.counts.items()}
    data = {"trained": trained, "all": every, "lora_modules": adapters, "parts": by_part}
    return Line("trained", text, data)


def accel_line(served: Plan | None) -> Line:
    """What would be swapped, and how much was refused."""
    if served is None:
        return Line("accel", "nothing is swapped: plain transformers", {"swapped": {}, "refused": {}})
    swapped = Counter(claim.fusion for claim in served.claims)
    refused = Counter(fusion for fusion, _ in served.refusals)
    text = ", ".join(f"{number} {name}" for name, number in swapped.items()) or "nothing"
    why = "; ".join(dict.fromkeys(f"{fusion}: {no.reason}" for fusion, no in served.refusals))
    text = f"{text} on {served.facts.device_name} ({served.facts.device})" + (f"\nrefused: {why}" if why else "")
    return Line("accel", text, {"swapped": dict(swapped), "refused": dict(refused), "plan": served.to_dict()})


def data_line(recipe: Recipe) -> Line:
    """Where the rows are."""
    named = {"": recipe.data, **{f"{name}: ": source for name, source in recipe.held_out.items()}}
    texts = [f"{name}{source.kind}, {place_of(source).said}" for name, source in named.items()]
    validation = {name: {"kind": one.kind, "here": place_of(one).is_here} for name, one in recipe.held_out.items()}
    data = {"kind": recipe.data.kind, "here": place_of(recipe.data).is_here, "validation": validation}
    return Line("data", "\n".join(texts), data)


def mesh_line(mesh: Mesh, world_size: int) -> Line:
    """How the processes are laid out."""
    how = {"none": "not spread", "ddp": "DDP", "fsdp2": "FSDP2", "megatron_fsdp": "Megatron-FSDP"}[mesh.wrapping]
    several = f"{mesh} on {world_size} processes, {how}" if world_size > 1 else f"one process, {how}"
    return Line("mesh", several, {**dict(zip(AXES, mesh.sizes, strict=True)), "world_size": world_size})


def batch_line(recipe: Recipe, mesh: Mesh, accumulate: int) -> Line:
    """Rows and tokens of a step."""
    batching, ranks = recipe.batching, mesh.replicate * mesh.shard
    rows = recipe.training.global_batch_size
    packs = batching.packing and not recipe.has_images  # images stay with their text, a sample a row
    at_most = "" if packs else "at most "
    text = (
        f"{rows} rows of {at_most}{batching.seq_length:,} tokens a step, {at_most}{rows * batching.seq_length:,} tokens, "
        f"{'packed' if packs else 'padded'}\n{many(batching.batch_size, 'row')} x {many(accumulate, 'micro-batch')} "
        f"x {many(ranks, 'data rank')}"
    )
    data = {
        "rows": rows,
        "seq_length": batching.seq_length,
        "batch_size": batching.batch_size,
        "packing": packs,
    }
    return Line("batch", text, {**data, "micro_batches": accumulate, "data_ranks": ranks})


def steps_of(recipe: Recipe, mesh: Mesh | None, accumulate: int | None) -> Steps:
    """The number of steps, where it is known without reading the data.

    Raises:
        ValueError: data that is at hand does not fit the batching.
    """
    chosen = recipe.training
    is_at_hand = isinstance(recipe.data, MockData | BinData) and place_of(recipe.data).is_here
    if not is_at_hand or mesh is None or accumulate is None:
        return Steps(chosen.steps if chosen.epochs is None else None)
    ranks = mesh.replicate * mesh.shard
    loader = open_data(recipe.data, None, recipe.batching, data_size=ranks, epochs=1)  # type: ignore[arg-type]
    of_epoch = -(-len(loader) // accumulate)
    if chosen.steps is not None and chosen.epochs is None:
        return Steps(chosen.steps, of_epoch)
    loader = open_data(recipe.data, None, recipe.batching, data_size=ranks, epochs=chosen.epochs or 1)  # type: ignore[arg-type]
    there = -(-len(loader) // accumulate)
    return Steps(there if chosen.steps is None else min(chosen.steps, there), of_epoch)


def steps_line(recipe: Recipe, steps: Steps | None) -> Line:
    """How long the run is."""
    chosen, known = recipe.training, steps.count if steps is not None else None
    epochs = many(chosen.epochs or 1, "epoch")
    if known is not None:
        text = many(known, "step")
        if steps is not None and steps.of_epoch is not None:
            text += f", {known / steps.of_epoch:.2f} epochs of {many(steps.of_epoch, 'step')}"
    elif chosen.steps is not None:
        text = f"{many(chosen.steps, 'step')}, or fewer where {epochs} of the data end sooner"
    else:
        text = f"{epochs}; how many steps these are shows when the data is read"
    data = {"steps": known, "at_most": chosen.steps, "epochs": chosen.epochs, "of_epoch": steps and steps.of_epoch}
    return Line("steps", text, data)


def optimizer_line(recipe: Recipe, model: nn.Module | None, steps: Steps | None) -> Line:
    """Kind, rates and schedule.

    Raises:
        ValueError: nothing trains, a pattern fits nothing, or the schedule is longer than the run.
    """
    chosen, moves = recipe.optimizer, recipe.schedule
    if steps is not None and steps.count is not None:
        moves.factors(steps.count)
    groups = None if model is None else len(chosen.build(model.named_parameters()).param_groups)
    warmup = f"{moves.warmup:.0%} of the steps" if moves.warmup < 1 else many(round(moves.warmup), "step")
    text = f"{chosen.kind}, rate {chosen.lr:g}, {moves.kind}" + (f" after a warmup of {warmup}" if moves.warmup else "")
    if recipe.training.max_grad_norm is not None:
        text += f"; gradients clipped to {recipe.training.max_grad_norm:g}"
    data = {"kind": chosen.kind, "lr": chosen.lr, "schedule": moves.kind, "warmup": moves.warmup, "groups": groups}
    return Line("optimizer", text, data)


def checkpoint_line(recipe: Recipe, steps: Steps | None) -> Line:
    """What is saved when, and where."""
    saving, folder = recipe.checkpoint, recipe.output
    known = steps.count if steps is not None else None
    number = None if known is None else 1 + (0 if saving.every is None else (known - 1) // saving.every)
    when = "at the end" if saving.every is None else f"every {many(saving.every, 'step')} and at the end"
    times = "" if number is None else f" ({number} in all)"
    stay = "all stay" if saving.keep_last is None else f"the last {saving.keep_last} stay"
    best = f", and the {saving.keep_best} best" if saving.keep_best else ""
    where = f"in {folder / CHECKPOINTS}" if folder is not None else "no output is named"
    text = f"{when}{times}, {stay}{best}; {where}"
    if saving.export and folder is not None:
        kind = "the adapter for PEFT" if recipe.lora is not None else "the model for transformers"
        text += f"\nthen {kind} in {folder / MODEL}"
    data = {"every": saving.every, "number": number, "keep_last": saving.keep_last, "keep_best": saving.keep_best}
    return Line("checkpoints", text, {**data, "export": saving.export, "folder": str(folder) if folder else None})


def logging_line(recipe: Recipe) -> Line:
    """Where figures go, and when it is validated."""
    every = "every step" if recipe.logging.every == 1 else f"every {recipe.logging.every} steps"
    text = f"{every}: " + ", ".join(["the console", "training.jsonl", *recipe.logging.trackers])
    if recipe.held_out:
        when = recipe.training.validate_every
        often = [] if when is None else [f"every {many(when, 'step')}"]
        often = ["at the start"] * recipe.training.validate_at_start + often + ["at the end"]
        text += f"\nvalidated on {', '.join(recipe.held_out)} {' and '.join(often)}"
    data = {"every": recipe.logging.every, "trackers": list(recipe.logging.trackers)}
    return Line("logs", text, {**data, "validate_every": recipe.training.validate_every})


def memory_line(found: Answer) -> Line:
    """The peak on one GPU, by parts."""
    peak, plain = found.memory.peak, found.plain.peak
    parts = sorted(peak.bytes.items(), key=lambda part: -part[1])
    shown = [f"{name} {gib(size)}" for name, size in parts if size >= SMALLEST_SHOWN * GIB]
    text = f"{gib(peak.total)} GiB a GPU, in {peak.name}; plain transformers {gib(plain.total)} GiB"
    text += f"\n{', '.join(shown)}" if shown else ""
    if found.memory.host:
        text += f"\nand {gib(found.memory.host)} GiB of the host for each GPU"
    if found.fits is not None and found.question.gib is not None:
        room = f"{found.question.gib:.0f} GiB"
        remedy = f"this would: {said(found.other)}" if found.other else "nor does any mesh tried"
        text += f"\nit fits into {room}" if found.fits else f"\nit does not fit into {room}; {remedy}"
    text += "".join(f"\nnot counted: {note}" for note in found.shape.notes)
    return Line("memory", text, data_of(found))


def trial_line(trial: Trial) -> Line:
    """What the two steps gave."""
    rows = [f"loss {row['loss']:.4f}, gradient {_number(row['grad_norm'])}" for row in trial.rows]
    seen = "random images and tokens" if trial.saw_images else "random tokens"
    text = f"{many(len(rows), 'step')} on {seen}: {'; '.join(rows)}"
    text += "".join(f"\n{change}" for change in trial.changed)
    kept = ("step", "loss", "grad_norm", "lr", "num_label_tokens")
    data = {"rows": [{name: row[name] for name in kept} for row in trial.rows], "changed": list(trial.changed)}
    return Line("tried", text, {**data, "images": trial.saw_images})


def sheet(lines: Sequence[Line]) -> str:
    """Names and what is said of them, side by side, as wide as the terminal."""
    margin = max((len(line.name) for line in lines), default=0) + 3
    rows: list[str] = []
    for line in lines:
        said = [part for text in line.said.splitlines() for part in wrapped(text, margin)]
        rows += [f"{line.name if not number else '':{margin}}{part}" for number, part in enumerate(said)]
    return "\n".join(rows)


def wrapped(text: str, margin: int = 0) -> list[str]:
    """Lines that fit the terminal beside a margin."""
    from rich.console import Console

    return textwrap.wrap(text, min(Console().width, WIDTH) - margin)


def many(number: int, what: str) -> str:
    """1 step, 2 steps, 4 micro-batches."""
    ending = "" if number == 1 else "es" if what.endswith("batch") else "s"
    return f"{number:,} {what}{ending}"


def count(number: int) -> str:
    """1.24 billion, 11.3 million, 512."""
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f}"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _inner(model: nn.Module) -> Any:
    inner: Any = model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _with_adapters(model: nn.Module) -> tuple[int, int]:
    """Parameters, adapters included, and those that train."""
    weights = list(model.parameters())
    return sum(one.numel() for one in weights), sum(one.numel() for one in weights if one.requires_grad)
