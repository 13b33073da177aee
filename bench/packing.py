"""Packed rows against padded ones: tokens a second of the same recipe, and how full its rows are.

python -m bench packing examples/recipes/smollm2_lora.yaml
python -m bench packing recipe.yaml --documents 16 --repeats 3

Tokens are real ones, without padding, of forward, backward and optimizer. Each run is a process of its own, and the ways take turns. A
padded step has as many documents as a packed one holds on average.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from automodel_accel.recipes.recipe import load
from bench.rows import about_run, append

TIMES = ("seconds_data", "seconds_forward_backward", "seconds_optimizer")
WARMED = 2


def ways(documents: int, seq_length: int) -> dict[str, list[str]]:
    """Name -> overrides of a recipe."""
    rows = [
        f"--batching.batch_size={documents}",
        f"--training.global_batch_size={documents}",
        "--batching.packing=false",
    ]
    return {
        "padded to the row's length": [*rows, f"--batching.pad_to_multiple_of={seq_length}"],
        "padded to the longest": rows,
        "grouped by length": [*rows, "--batching.group_by_length=true"],
        "packed": ["--batching.packing=true"],
    }


def measured(recipe: Path, overrides: Sequence[str], steps: int) -> dict[str, float]:
    """One run: real tokens a second, tokens a step, seconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--validation=null", "--checkpoint.every=null", "--checkpoint.export=false", "--schedule.warmup=0"]
        own = [f"--training.steps={steps}", f"--output={folder}/run"]
        command = [sys.executable, "-m", "automodel_accel", "train", str(recipe), *overrides, *quiet, *own]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(done.stderr[-2000:])
        rows = [json.loads(line) for line in Path(folder, "run", "training.jsonl").read_text().splitlines()][WARMED:]
    seconds = [sum(row[name] for name in TIMES) for row in rows]
    tokens = [row["tps"] * one for row, one in zip(rows, seconds, strict=True)]
    return {
        "tokens_per_second": sum(tokens) / sum(seconds),
        "tokens": statistics.mean(tokens),
        "seconds": statistics.median(seconds),
    }


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and append a row."""
    parser = argparse.ArgumentParser(prog="python -m bench packing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--documents", type=int, default=8, help="of a padded step (%(default)s)")
    parser.add_argument(
        "--steps", type=int, default=8, help="of each run, the first two of which warm up (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=2, help="of each way, by turns (%(default)s)")
    options, overrides = parser.parse_known_args(arguments)
    length = load(options.recipe, overrides).batching.seq_length
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways(options.documents, length)}
    for name in tqdm([name for _ in range(options.repeats) for name in found], "runs", disable=None):
        chosen = [*overrides, *ways(options.documents, length)[name]]
        found[name].append(measured(options.recipe, chosen, options.steps))
    speed = {name: statistics.median(run["tokens_per_second"] for run in runs) for name, runs in found.items()}
    _print(options, found, speed)
    row: dict[str, Any] = {
        "case": "packing",
        "recipe": options.recipe.name,
        "documents": options.documents,
        "seq_length": length,
        "runs": found,
        "ratio": {name: speed["packed"] / one for name, one in speed.items()},
    }
    append([{**about_run(torch.get_num_threads(), options.repeats), **row}])
    return 0


def _print(options: argparse.Namespace, found: dict[str, list[dict[str, float]]], speed: dict[str, float]) -> None:
    grid = Table(title=f"{options.recipe.name}: {options.documents} documents a padded step", title_justify="left")
    for name in ("rows are", "tokens a step", "a step", "tokens/s", "packed is", "between runs"):
        grid.add_column(name, justify="left" if name == "rows are" else "right")
    for name, runs in found.items():
        rates = [run["tokens_per_second"] for run in runs]
        tokens, seconds = (statistics.median(run[what] for run in runs) for what in ("tokens", "seconds"))
        ratio = f"{speed['packed'] / speed[name]:.2f}x"
        grid.add_row(
            name, f"{tokens:.0f}", f"{seconds:.2f} s", f"{speed[name]:.0f}", ratio, f"x{max(rates) / min(rates):.2f}"
        )
    Console().print(grid)
