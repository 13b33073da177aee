"""Whether a recipe of 8-bit products trains within the noise of bfloat16.

The noise of a figure is its standard deviation over the seeds of bfloat16. Trainings of one seed do not stay together: any rounding
leads them apart after some dozen steps, as the control shows, bfloat16 from weights of which one in twelve is moved by a unit in the
last place (it stays nearer than another seed, 8-bit products come to be as far). So a difference to bfloat16 of the same seed is
judged as one of two seeds, whose noise is sqrt(2) times as large, and the mean of n of them by sqrt(2 / n). A recipe lies within the
noise where neither any of its differences nor their mean is more than `ALLOWED` times its own noise, above or below. More seeds see
smaller differences. NaN lies outside.

Two figures are judged: the mean loss of the last `FINAL` steps, whose noise is also that of another order of the text, and the loss on
held-out text, the same for all, whose noise is that of the trained weights alone.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

Row = dict[str, Any]
BASELINE = "bfloat16"
MOVED = "bfloat16_moved"  # the same from weights moved by a rounding: what a seed's own differences are
ALLOWED = 2.0
FINAL = 20  # steps at the end whose mean loss is judged
FIGURES = {"final_loss": f"last {FINAL} steps", "held_out_loss": "held out"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A recipe by one figure.

    Attributes:
        recipe: Its name.
        figure: Of the row.
        mean: Of the figure over its seeds.
        differences: To bfloat16's of the same seed, by seed.
        noise: Standard deviation of bfloat16's over the seeds.
    """

    recipe: str
    figure: str
    mean: float
    differences: tuple[float, ...]
    noise: float

    @property
    def difference(self) -> float:
        """The mean of the differences."""
        return statistics.mean(self.differences)

    @property
    def allowed(self) -> float:
        """Of the mean."""
        return ALLOWED * self.noise * math.sqrt(2 / len(self.differences))

    @property
    def allowed_of_one(self) -> float:
        """Of each difference."""
        return ALLOWED * self.noise * math.sqrt(2)

    @property
    def within(self) -> bool:
        """Whether every difference and their mean is within its noise."""
        each = all(abs(one) <= self.allowed_of_one for one in self.differences)
        return each and abs(self.difference) <= self.allowed


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Of every recipe by every figure. Rows: of bfloat16 with two seeds or more, and of each recipe with some of those."""
    found = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows if row["recipe"] != BASELINE):
        for figure in FIGURES:
            base, values = by_seed(rows, BASELINE, figure), by_seed(rows, recipe, figure)
            differences = tuple(value - base[seed] for seed, value in values.items())
            mean = statistics.mean(values.values())
            found.append(Verdict(recipe, figure, mean, differences, statistics.stdev(base.values())))
    return found


def by_seed(rows: Sequence[Row], recipe: str, figure: str) -> dict[int, Any]:
    """A figure of one recipe."""
    return {row["seed"]: row[figure] for row in rows if row["recipe"] == recipe}


def shared(rows: Sequence[Row]) -> list[int]:
    """The seeds that every recipe has."""
    recipes = {row["recipe"] for row in rows}
    return sorted(set.intersection(*(set(by_seed(rows, recipe, "seed")) for recipe in recipes)))


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of the last `FINAL` steps (or as many as there are) at every step."""
    return [statistics.fmean(losses[max(0, end - FINAL) : end]) for end in range(1, len(losses) + 1)]


COLUMNS = ("recipe", "figure", "loss", "by seed", "noise", "mean", "allowed", "of one", "verdict", "s")


def table(rows: Sequence[Row]) -> Table:
    """Losses, differences and verdicts."""
    first = rows[0]
    found = Table(
        title=f"{first['parameters'] / 1e6:.2f} million weights, {first['steps']} steps of {first['rows']} x {first['length']} bytes",
        caption="loss in nats a byte; by seed and its mean: differences to bfloat16 of the same seed, and what is allowed of both\n"
        f"{first['device_name']} {first['arch']}",
    )
    for name in COLUMNS:
        found.add_column(name, justify="left" if name in ("recipe", "figure", "by seed") else "right")
    for figure, name in FIGURES.items():
        values = by_seed(rows, BASELINE, figure).values()
        losses, noise = " ".join(f"{loss:.3f}" for loss in values), statistics.stdev(values)
        about = (f"{statistics.mean(values):.3f}", losses, f"{noise:.3f}")
        found.add_row(BASELINE, name, *about, *"----", _seconds(rows, BASELINE))
    for one in verdicts(rows):
        differences = " ".join(f"{difference:+.3f}" for difference in one.differences)
        allowed = (f"{one.difference:+.3f}", f"{one.allowed:.3f}", f"{one.allowed_of_one:.3f}")
        judged = (f"{one.noise:.3f}", *allowed, "within" if one.within else "outside")
        cells = (f"{one.mean:.3f}", differences, *judged, _seconds(rows, one.recipe))
        found.add_row(one.recipe, FIGURES[one.figure], *cells)
    return found


def _seconds(rows: Sequence[Row], recipe: str) -> str:
    return f"{statistics.median(by_seed(rows, recipe, 'seconds').values()):.0f}"
