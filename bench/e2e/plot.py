"""The picture of an end-to-end benchmark: for every job its loss curves, its speed and its memory."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from bench.e2e.variants import VANILLA

matplotlib.use("Agg")
from matplotlib import pyplot

Row = dict[str, Any]
COLOURS = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
WIDTH, HEIGHT = 13.0, 3.2  # inches, of a job


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw the rows that were measured, a line of three pictures a job. Returns whether there were any."""
    measured = [row for row in rows if "seconds" in row]
    jobs = [list(group) for _, group in itertools.groupby(measured, key=_title)]
    if not jobs:
        return False
    variants = list(dict.fromkeys(row["variant"] for row in measured))
    colours = {variant: COLOURS[number % len(COLOURS)] for number, variant in enumerate(variants)}
    figure, axes = pyplot.subplots(
        len(jobs), 3, figsize=(WIDTH, HEIGHT * len(jobs)), squeeze=False, layout="constrained", width_ratios=(1.4, 1, 1)
    )
    for line, job in zip(axes, jobs, strict=True):
        _losses(line[0], job, colours)
        _bars(line[1], job, colours, "tokens_per_second", 1.0, "tokens per second")
        _bars(line[2], job, colours, "peak_memory_bytes", 1e9, "peak memory, GB")
    first = jobs[0][0]
    figure.suptitle(f"{first['device_name']}, {first['dtype']}, commit {first['commit']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _title(row: Row) -> str:
    return f"{row['model']} ({row['layers']} layers), {row['method']}, {row['layout']}"


def _losses(axes: Axes, job: list[Row], colours: dict[str, Any]) -> None:
    """The curves lie on each other where all is well: vanilla's is drawn broad, the others thin on top of it."""
    for row in job:
        width, alpha = (6.0, 0.35) if row["variant"] == VANILLA else (1.3, 1.0)
        steps = range(1, len(row["losses"]) + 1)
        axes.plot(steps, row["losses"], color=colours[row["variant"]], lw=width, alpha=alpha, label=row["variant"])
    axes.set_title(_title(job[0]), fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize=7)


def _bars(axes: Axes, job: list[Row], colours: dict[str, Any], figure: str, unit: float, title: str) -> None:
    names = [row["variant"].replace(":", "\n") for row in job]
    bars = axes.barh(names, [row[figure] / unit for row in job], color=[colours[row["variant"]] for row in job])
    axes.bar_label(bars, fmt="{:,.4g}", fontsize=7, padding=2)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_title(title, fontsize=10)
