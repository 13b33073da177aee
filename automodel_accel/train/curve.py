"""The losses of a run as a picture."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from automodel_accel.train.logs import TRAINING, VALIDATION

SMOOTHED = 20  # windows over the run: single steps behind, their means before them


def draw(folder: Path) -> Path:
    """Write loss_curve.png beside the logs of a run, and return its path.

    Raises:
        ValueError: there is no step in the logs.
    """
    from matplotlib.figure import Figure  # an optional package, and slow to import

    training = [row for row in _rows(folder / TRAINING) if isinstance(row.get("loss"), float)]
    if not training:
        raise ValueError(f"{folder / TRAINING} holds no step with a loss; expected the log of a run.")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    steps, losses = [row["step"] for row in training], [row["loss"] for row in training]
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="training, each step")
    width = max(1, len(steps) // SMOOTHED)
    axes.plot(*_means(steps, losses, width), color="C0", label=f"training, mean of {width} steps")
    held_out: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in _rows(folder / VALIDATION):
        if isinstance(row.get("val_loss"), float):
            held_out[row["name"]].append((row["step"], row["val_loss"]))
    for number, (name, points) in enumerate(held_out.items(), start=1):
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=f"validation: {name}")
    axes.set(xlabel="step", ylabel="loss (nats a label token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss_curve.png"
    figure.savefig(path, dpi=120)
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _means(steps: list[int], losses: list[float], width: int) -> tuple[list[int], list[float]]:
    starts = range(0, len(steps) - width + 1, width)
    return [steps[at + width - 1] for at in starts], [sum(losses[at : at + width]) / width for at in starts]
