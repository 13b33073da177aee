"""A recipe as a run in its folder: what it leaves beside its checkpoints, and whether it may go on there."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from automodel_accel.api import report
from automodel_accel.checkpoint import export
from automodel_accel.kernels.facts import this_machine
from automodel_accel.parallel.mesh import Ranks
from automodel_accel.patches.retype import original_class
from automodel_accel.recipes.building import build
from automodel_accel.recipes.filling import to_plain, to_yaml
from automodel_accel.recipes.reading import parse
from automodel_accel.recipes.recipe import Recipe
from automodel_accel.train.loop import Outcome, train
from automodel_accel.train.run import Run

logger = logging.getLogger("automodel_accel")
RECIPE, FIGURES, CHECKPOINTS, MODEL = "recipe.yaml", "figures.json", "checkpoints", "model"
# a run goes on with other values of these: they change neither what it computes nor in which order
FREE = ("mesh", "logging", "checkpoint", "output", "validation", "accel", "batching.batch_size", "batching.prefetch")
FREE_IN_TRAINING = ("training.validate_every", "training.validate_at_start", "training.bad_steps")


def run_recipe(recipe: Recipe, ranks: Ranks, said: Callable[[str], None]) -> Outcome:
    """Train, and leave in `recipe.output`: recipe.yaml, plan.txt, report.json, the rows of the log, loss_curve.png, figures.json,
    checkpoints/ and the exported model.

    Args:
        recipe: With an output.
        ranks: Of `recipe.mesh`, running.
        said: Takes what is said of the run before it begins; of the first rank.

    Raises:
        ValueError: the recipe does not work, or the folder holds a run of another one.
        FloatingPointError: the loss is not finite.
    """
    assert recipe.output is not None
    check_folder(recipe)
    started = time.perf_counter()
    run = build(recipe, ranks)
    if run.is_first:
        _write_beginning(run, recipe)
        said(summary(run))
    built = time.perf_counter() - started
    outcome = train(run)
    if run.is_first:
        _write_report(run)
        _draw(run.folder)
        (run.folder / FIGURES).write_text(json.dumps(figures(run, outcome, built), indent=1) + "\n", encoding="utf-8")
    if outcome.is_complete and recipe.checkpoint.export:
        export_model(run, outcome, built)
    return outcome


def check_folder(recipe: Recipe) -> None:
    """Whether the run may begin, or go on, in its folder.

    Raises:
        ValueError: the folder holds checkpoints of another recipe, or `checkpoint.resume` forbids what is there.
    """
    assert recipe.output is not None
    folder, resume = recipe.output, recipe.checkpoint.resume
    begun = (folder / CHECKPOINTS).is_dir() and any((folder / CHECKPOINTS).iterdir())
    if resume == "must" and not begun:
        raise ValueError(f"checkpoint.resume is must, but {folder / CHECKPOINTS} holds no checkpoint.")
    if not begun:
        return
    if resume == "never":
        raise ValueError(
            f"{folder} holds the checkpoints of a run, and checkpoint.resume is never; choose another output, or remove the folder."
        )
    if (folder / RECIPE).is_file():
        before: Any = parse((folder / RECIPE).read_text(encoding="utf-8"), str(folder / RECIPE)).plain()
        changed = list(_changes(_fixed(before), _fixed(to_plain(recipe))))
        if changed:
            raise ValueError(
                f"{folder} holds a run of another recipe: {'; '.join(changed[:5])}. To go on set these back; to begin anew choose "
                "another output (--output=...), or remove the folder."
            )


def summary(run: Run) -> str:
    """A few lines on what begins."""
    trained = sum(one.numel() for one in run.model.parameters() if one.requires_grad)
    every = sum(one.numel() for one in run.model.parameters())
    inner: Any = run.model
    adapted = hasattr(inner, "get_base_model")
    made = original_class(inner.get_base_model() if adapted else inner).__name__.removeprefix("FSDP")
    lines = [f"{made}{' with adapters' * adapted}: {trained:,} of {every:,} parameters train, on {run.device}"]
    if run.report is not None:
        done = run.report
        lines.append(
            f"{len(done.applied)} places swapped and proved, {len(done.refusals)} refused (see {run.folder / 'plan.txt'})"
            + (f"; {done.mesh}" if done.mesh else "")
        )
    if run.data.counts.rows:
        lines += run.data.counts.lines()
    lines.append(
        f"{run.steps:,} steps of {run.training.global_batch_size} rows of {run.recipe['batching']['seq_length']:,} tokens"
    )
    return "\n".join(lines)


def figures(run: Run, outcome: Outcome, seconds_to_build: float) -> dict[str, Any]:
    """What the run gave, as JSON."""
    totals, machine = outcome.totals, this_machine()
    rate = totals.tokens / totals.seconds if totals.seconds else None
    return {
        "steps": outcome.step,
        "complete": outcome.is_complete,
        "seconds": totals.seconds,
        "seconds_to_build": seconds_to_build,
        "tokens": totals.tokens,
        "label_tokens": totals.label_tokens,
        "tokens_per_second": rate,
        "peak_memory_gb": totals.peak_memory_gb,
        "loss": outcome.loss,
        "validation": outcome.validation,
        "validation_at_start": outcome.validation_at_start,
        "processes": run.world_size,
        "device": machine.device_name,
        "trained_parameters": sum(one.numel() for one in run.model.parameters() if one.requires_grad),
    }


def export_model(run: Run, outcome: Outcome, seconds_to_build: float) -> Path:
    """Write the trained model, or its adapter, for others; on all ranks. What was written before stays."""
    folder = run.folder / MODEL
    if not (folder.is_dir() and any(folder.iterdir())):
        with run.average.in_place() if run.average is not None else nullcontext():
            export(run.model, folder)
        if run.is_first:
            _write_companions(run, outcome, seconds_to_build, folder)
    return folder


def _write_companions(run: Run, outcome: Outcome, seconds_to_build: float, folder: Path) -> None:
    from automodel_accel.train.card import model_card

    if run.tokenizer is not None:
        run.tokenizer.save_pretrained(folder)
    card = model_card(dict(run.recipe), figures(run, outcome, seconds_to_build))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_beginning(run: Run, recipe: Recipe) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
    if run.report is not None:
        (run.folder / "plan.txt").write_text(str(run.report.plan), encoding="utf-8")
        _write_report(run)


def _write_report(run: Run) -> None:
    if run.report is not None:
        (run.folder / "report.json").write_text(report(run.model).to_json() + "\n", encoding="utf-8")


def _draw(folder: Path) -> None:
    if not this_machine().has("matplotlib"):
        logger.warning("%s: no loss_curve.png, as matplotlib is not installed; pip install matplotlib.", folder)
        return
    from automodel_accel.train.curve import draw

    draw(folder)


def _fixed(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change when a run goes on, as "section.key" -> value."""
    found = dict(_leaves(plain))
    return {name: value for name, value in found.items() if not _is_free(name)}


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in (*FREE, *FREE_IN_TRAINING))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
