"""automodel-accel bench: a recipe, by plain transformers and with automodel_accel."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from automodel_accel.cli.errors import fail
from automodel_accel.cli.training import as_overrides

EPILOG = (
    "Examples:\n\nautomodel-accel bench examples/recipes/smollm2_lora.yaml\n\n"
    "automodel-accel bench recipe.yaml --steps 30 --repeats 3 --batching.batch_size=4 --json"
)
TIMES = ("seconds_data", "seconds_forward_backward", "seconds_optimizer")
WARMED = 2  # steps that are left out: the first ones allocate and compile
VARIANTS = {"transformers": ("--accel=false",), "automodel_accel": ()}


@dataclass(frozen=True, slots=True)
class Measured:
    """One variant, of all its repetitions.

    Attributes:
        seconds_per_step: Median over the steps.
        spread: Of the medians of the repetitions, largest by smallest.
        tokens_per_second: Without padding.
        peak_memory_gb: The most of all repetitions, in 1e9 bytes.
        losses: Of each step; of the first repetition.
    """

    seconds_per_step: float
    spread: float
    tokens_per_second: float
    peak_memory_gb: float
    losses: tuple[float, ...]


def bench(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A YAML file for one process.", metavar="RECIPE")],
    steps: Annotated[int, typer.Option(help="Steps of each run.", min=WARMED + 1)] = 12,
    repeats: Annotated[int, typer.Option(help="Runs of each variant, by turns.", min=1)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """How much faster and leaner a recipe is than by plain transformers, and whether it computes the same losses.

    Each run is a process of its own; the variants take turns, so that a machine that slows down slows both.
    """
    try:
        found = _measure(recipe, as_overrides(context.args), steps, repeats)
    except ValueError as error:
        fail(str(error))
    print(json.dumps(_as_data(found), indent=2) if as_json else _as_table(recipe, found, steps, repeats))


def _measure(recipe: Path, overrides: Sequence[str], steps: int, repeats: int) -> dict[str, Measured]:
    from tqdm import tqdm

    from automodel_accel.recipes.recipe import load

    chosen = load(recipe, overrides)
    if chosen.fp8 is not None or chosen.distillation is not None:
        raise ValueError(
            "bench holds a recipe against plain transformers, which has neither fp8 nor distillation; --fp8=null, or another recipe."
        )
    rows: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in VARIANTS}
    memory: dict[str, list[float]] = {name: [] for name in VARIANTS}
    turns = [name for _ in range(repeats) for name in VARIANTS]
    for name in tqdm(turns, "runs", disable=None):
        with tempfile.TemporaryDirectory() as folder:
            _run(recipe, [*overrides, *VARIANTS[name]], steps, Path(folder))
            rows[name].append([json.loads(line) for line in (Path(folder) / "training.jsonl").read_text().splitlines()])
            memory[name].append(json.loads((Path(folder) / "figures.json").read_text())["peak_memory_gb"])
    return {name: _summed(rows[name], max(memory[name])) for name in VARIANTS}


def _run(recipe: Path, overrides: Sequence[str], steps: int, folder: Path) -> None:
    own = [f"--output={folder}", f"--training.steps={steps}", "--validation=null", "--logging.every=1"]
    quiet = ["--checkpoint.export=false", "--checkpoint.every=null", "--schedule.warmup=0"]
    command = [sys.executable, "-m", "automodel_accel", "train", str(recipe), *overrides, *own, *quiet]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the recipe does not run: {done.stderr.strip()[-2000:].removeprefix('error: ')}")


def _summed(runs: list[list[dict[str, Any]]], memory: float) -> Measured:
    seconds = [[sum(row[name] for name in TIMES) for row in rows[WARMED:]] for rows in runs]
    medians = [statistics.median(one) for one in seconds]
    tokens = [row["tps"] * sum(row[name] for name in TIMES) for rows in runs for row in rows[WARMED:]]
    every = [one for run in seconds for one in run]
    return Measured(
        statistics.median(every),
        max(medians) / min(medians),
        sum(tokens) / sum(every),
        memory,
        tuple(row["loss"] for row in runs[0]),
    )


def _ratios(found: dict[str, Measured]) -> dict[str, float]:
    plain, ours = found["transformers"], found["automodel_accel"]
    return {
        "speedup": plain.seconds_per_step / ours.seconds_per_step,
        "memory": ours.peak_memory_gb / plain.peak_memory_gb,
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(plain.losses, ours.losses, strict=True)),
    }


def _as_data(found: dict[str, Measured]) -> dict[str, Any]:
    return {**{name: asdict(one) for name, one in found.items()}, **_ratios(found)}


def _as_table(recipe: Path, found: dict[str, Measured], steps: int, repeats: int) -> str:
    from automodel_accel.tables import table

    rows = [
        (
            *(name, f"{one.seconds_per_step:.3f} s", f"{one.tokens_per_second:,.0f}", f"{one.peak_memory_gb:.2f} GB"),
            *(f"{one.losses[0]:.4f}", f"{one.losses[-1]:.4f}", f"x{one.spread:.2f}"),
        )
        for name, one in found.items()
    ]
    header = ("variant", "a step", "tokens/s", "peak memory", "first loss", "last loss", "between runs")
    ratios = _ratios(found)
    return (
        table(f"{recipe}: {steps} steps, {repeats} times each, by turns", header, rows)
        + f"\n{ratios['speedup']:.2f}x as fast, {ratios['memory']:.2f}x the memory; the losses differ by at most "
        f"{ratios['largest_difference_of_losses']:.1e}"
    )
