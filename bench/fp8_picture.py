"""The picture of bench/fp8_training.py: loss curves, their differences to bfloat16's, and the held-out losses, with the noise."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.fp8_curves import BASELINE, FIGURES, FINAL, MOVED, Row, by_seed, shared, smoothed, verdicts

matplotlib.use("Agg")

# told apart by those who see no red or no green (after Okabe and Ito)
COLOURS = {
    BASELINE: "#777777",
    "tensorwise": "#0072b2",
    "rowwise": "#d55e00",
    "tensorwise_e5m2": "#009e73",
    "delayed": "#cc79a7",
    MOVED: "#000000",
}
BAND = "#dddddd"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of one run of the benchmark."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.7, 1), height_ratios=(1.5, 1))
    curves = {recipe: _curves(rows, recipe) for recipe in dict.fromkeys(row["recipe"] for row in rows)}
    above = figure.add_subplot(grid[0, 0])
    both = shared(rows)
    _losses(above, curves, both)
    _differences(figure.add_subplot(grid[1, 0], sharex=above), curves)
    right = grid[:, 1].subgridspec(2, 1)
    for number, (name, said) in enumerate(FIGURES.items()):
        _judged(figure.add_subplot(right[number]), rows, name, said)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    first = rows[0]
    figure.suptitle(
        f"Training with 8-bit products beside bfloat16: Llama structure, {first['parameters'] / 1e6:.1f} million weights, {len(both)} to {len(curves[BASELINE])} seeds\n"
        f"{first['data']}; {first['rows']} x {first['length']} bytes a step; {first['device_name']} {first['arch']}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")


def _curves(rows: Sequence[Row], recipe: str) -> dict[int, list[float]]:
    return {seed: smoothed(losses) for seed, losses in by_seed(rows, recipe, "losses").items()}


def _across(curves: dict[int, list[float]], figure: Any) -> list[float]:
    """A figure over the seeds, at every step."""
    return [figure(losses) for losses in zip(*curves.values(), strict=True)]


def _losses(axes: Axes, curves: dict[str, dict[int, list[float]]], both: Sequence[int]) -> None:
    mean, noise = _across(curves[BASELINE], statistics.fmean), _across(curves[BASELINE], statistics.stdev)
    steps = range(1, len(mean) + 1)
    low, high = ([m + sign * n for m, n in zip(mean, noise, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=BAND, label="bfloat16, mean +- noise")
    for recipe, of_seeds in curves.items():
        width = 3.0 if recipe == BASELINE else 1.1
        same = {seed: of_seeds[seed] for seed in both}
        axes.plot(steps, _across(same, statistics.fmean), color=COLOURS[recipe], lw=width, label=f"{recipe}, mean")
    axes.set_ylabel("training loss, nats a byte")
    axes.set_title(f"Loss, mean of the last {FINAL} steps", loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def _differences(axes: Axes, curves: dict[str, dict[int, list[float]]]) -> None:
    base = curves[BASELINE]
    noise = _across(base, statistics.stdev)
    steps = range(1, len(noise) + 1)
    axes.fill_between(steps, [-n for n in noise], noise, color=BAND)
    axes.axhline(0, color=COLOURS[BASELINE], lw=1)
    largest = 0.0
    for recipe, of_seeds in curves.items():
        for seed, losses in of_seeds.items() if recipe != BASELINE else ():
            differences = [one - other for one, other in zip(losses, base[seed], strict=True)]
            axes.plot(steps, differences, color=COLOURS[recipe], lw=0.9, alpha=0.8)
            largest = max(largest, *map(abs, differences))
    least = 1.3 * max(largest, statistics.median(noise))
    axes.set_ylim(-least, least)
    axes.set_xlim(0, len(noise))
    axes.set_xlabel("step")
    axes.set_ylabel("nats a byte")
    axes.set_title(
        "Difference to bfloat16 of the same seed, a line a seed; grey: noise of bfloat16 over seeds",
        loc="left",
        fontsize=10,
    )


def _judged(axes: Axes, rows: Sequence[Row], name: str, said: str) -> None:
    """A figure's differences: dots, and a bar for their mean."""
    found = [one for one in verdicts(rows) if one.figure == name]
    noise, of_one = found[0].noise, found[0].allowed_of_one
    mean = statistics.mean(by_seed(rows, BASELINE, name).values())
    axes.axhspan(-noise, noise, color=BAND, label=f"noise of bfloat16: {mean:.3f} +- {noise:.3f}")
    axes.axhline(0, color=COLOURS[BASELINE], lw=1)
    for place, one in enumerate(found):
        colour = COLOURS[one.recipe]
        axes.scatter([place] * len(one.differences), one.differences, color=colour, s=24, zorder=3)
        axes.hlines(one.difference, place - 0.25, place + 0.25, color=colour, lw=2.5)
        axes.hlines([-one.allowed, one.allowed], place - 0.4, place + 0.4, color="#333333", lw=1, ls="--")
    axes.hlines([], 0, 0, color="#333333", lw=1, ls="--", label="allowed of the mean")
    for sign in (-1, 1):
        axes.axhline(sign * of_one, color="#333333", lw=1, ls=":", label="allowed of one" if sign == 1 else None)
    axes.set_xticks(range(len(found)), [one.recipe.replace("_", "\n") for one in found], fontsize=8)
    axes.set_xlim(-0.6, len(found) - 0.4)
    largest = max(of_one, *(abs(difference) for one in found for difference in one.differences))
    axes.set_ylim(-1.1 * largest, 1.9 * largest)  # the legend stands above
    axes.set_ylabel("nats a byte")
    axes.set_title(
        f"Loss, {said}: differences to bfloat16\nof the same seed (dots), and their mean", loc="left", fontsize=10
    )
    axes.legend(fontsize=7.5, frameon=False, loc="upper left")
