"""How exact 8-bit products are on the values of a real training: `python -m bench.fp8_products`.

The model of bench/fp8_training.py trains in bfloat16. At a few of its steps the inputs, weights and gradients of the linears in
every layer are taken as they come, and the definition of each recipe (kernels/fp8_linear/reference.py) is held against the
products of the values themselves, both in float64: what is measured is the rounding to 8 bits alone. Linears of one input are one
place: q, k and v; gate and up. They share a scale, so outputs and weights' gradients are looked at one linear at a time: the
gradients of q and k are smaller than v's.

SQNR is the power of a product over that of its error, in dB. That of tokens is each row's of the input's gradient, of which the
lower tenth is given: one scale for all serves tokens of small gradients worse, which the SQNR of the whole hides. Zeroed is the share of
the elements of a gradient, other than 0, that a cast makes 0.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import linear
from tqdm import tqdm

from automodel_accel.kernels.fp8_linear import Recipe, reference
from automodel_accel.kernels.fp8_linear.scaling import formats_here
from automodel_accel.patches.fp8 import RECIPES
from bench.e2e.compare import THREADS
from bench.fp8_training import SMALL, TINY, WIDTH, build, texts, training
from bench.rows import RESULTS, Row, about_run, append

CASE = "fp8_products"
STEPS, MOMENTS = 200, 4  # of the training; steps at which values are taken, evenly, the last one among them
LOWER_TENTH = 0.1
SQNR = {"forward": "y", "input": "dx", "tokens": "dx, low tokens", "weight": "dW"}
ZEROED = {"zeroed_input": "0 for dx", "zeroed_weight": "0 for dW"}
EXAMPLE = """example:
  python -m bench.fp8_products        two minutes on one core

Rows, one for each recipe and step, are appended to fp8_products.jsonl."""


@dataclass(slots=True)
class Place:
    """Linears of one input, in one step.

    Attributes:
        name: Of the first one.
        x: Their input [..., H].
        weights: Theirs, [F_i, H].
        gradients: Of their outputs [..., F_i], by the number of the weight.
    """

    name: str
    x: torch.Tensor
    weights: list[torch.Tensor] = field(default_factory=list)
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)


class Taken:
    """What goes through the linears of a model's layers, from here to `close`."""

    def __init__(self, model: Any) -> None:
        self.places: list[Place] = []
        linears = ((name, child) for name, child in model.model.named_modules() if isinstance(child, nn.Linear))
        self._handles = [child.register_forward_hook(self._taker(name)) for name, child in linears]

    def _taker(self, name: str) -> Any:
        def take(module: nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not self.places or self.places[-1].x is not inputs[0]:
                self.places.append(Place(name, inputs[0]))
            place = self.places[-1]
            number = len(place.weights)
            place.weights.append(module.weight)
            output.register_hook(lambda gradient: place.gradients.update({number: gradient}))  # type: ignore[no-untyped-call]

        return take

    def close(self) -> None:
        """Take no more."""
        for handle in self._handles:
            handle.remove()


def figures(place: Place, recipe: Recipe) -> dict[str, list[float]]:
    """SQNR in dB and shares, by the names in `SQNR` and `ZEROED`; of each linear where it has its own."""
    x_NH = place.x.detach().flatten(0, -2).double()
    weights = [weight.detach().double() for weight in place.weights]
    gradients = [gradient.flatten(0, -2).double() for _, gradient in sorted(place.gradients.items())]
    formats = formats_here()
    wanted = formats.e5m2 if recipe.wide_gradients else formats.e4m3

    def exact(x: torch.Tensor, *w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(linear(x, one) for one in w)

    def rounded(x: torch.Tensor, *w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return reference.fp8_linears(x, w, [None] * len(w), recipe.rowwise, formats.e4m3, wanted)

    (ys, dx, dws), (true_ys, true_dx, true_dws) = (_products(of, x_NH, weights, gradients) for of in (rounded, exact))
    tokens = sqnr(dx, true_dx, 1)[true_dx.abs().amax(1) > 0]
    return {
        "forward": [sqnr(*pair).item() for pair in zip(ys, true_ys, strict=True)],
        "input": [sqnr(dx, true_dx).item()],
        "tokens": [tokens.quantile(LOWER_TENTH).item()],
        "weight": [sqnr(*pair).item() for pair in zip(dws, true_dws, strict=True)],
        **_zeroed(x_NH, torch.cat(weights), gradients, recipe, wanted, formats.e4m3),
    }


def sqnr(found: torch.Tensor, truth: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """In dB, of all or along `dim`."""
    return 10 * torch.log10(truth.square().sum(dim) / (found - truth).square().sum(dim))


def _products(
    of: Any, x_NH: torch.Tensor, weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> tuple[Sequence[torch.Tensor], torch.Tensor, Sequence[torch.Tensor]]:
    """Outputs, the input's gradient, the weights' gradients."""
    leaves = [leaf.clone().requires_grad_() for leaf in (x_NH, *weights)]
    outputs = of(*leaves)
    dx, *dws = torch.autograd.grad(outputs, leaves, tuple(gradients))
    return [output.detach() for output in outputs], dx, dws


def _zeroed(
    x_NH: torch.Tensor,
    w_FH: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    recipe: Recipe,
    wanted: torch.dtype,
    e4m3: torch.dtype,
) -> dict[str, list[float]]:
    """As the definition casts gradients for each of the two products."""
    g_NF = torch.cat(list(gradients), 1)
    if recipe.rowwise:
        w_scale, x_scale = reference.rounded(w_FH, e4m3, 1)[1], reference.rounded(x_NH, e4m3, 1)[1]
        of_input = reference.rounded(g_NF * w_scale.t(), wanted, 1)[0]
        of_weight = reference.rounded(g_NF * x_scale, wanted, 0)[0]
    else:
        of_input = of_weight = reference.rounded(g_NF, wanted, None)[0]
    widths = [gradient.shape[1] for gradient in gradients]
    return {
        name: [_share(*pair) for pair in zip(gradients, cast.split(widths, 1), strict=True)]
        for name, cast in zip(ZEROED, (of_input, of_weight), strict=True)
    }


def _share(before: torch.Tensor, after: torch.Tensor) -> float:
    return ((after == 0) & (before != 0)).sum().item() / max(1, int((before != 0).sum().item()))


def measured(steps: int, tiny: bool) -> list[Row]:
    """A row for each recipe and step at which values were taken."""
    setup = replace(TINY if tiny else SMALL, steps=steps)
    at = {steps * number // MOMENTS for number in range(1, MOMENTS + 1)} - {0}
    model, rows = build(setup, 0), []
    taken = Taken(model) if 1 in at else None
    bar = tqdm(training(model, setup, 0, texts()[0]), total=steps, unit="step", disable=None)
    for step, loss in enumerate(bar, 1):
        if taken is not None:
            taken.close()
            for name, recipe in RECIPES.items():
                if recipe.delayed:  # one call has no history
                    continue
                places = {place.name: figures(place, recipe) for place in taken.places}
                rows.append({"case": CASE, "recipe": name, "step": step, "loss": loss.item(), "places": places})
        taken = Taken(model) if step + 1 in at else None
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Mean over places and steps, and the worst."""
    steps = dict.fromkeys(row["step"] for row in rows)
    found = Table(
        title="8-bit products of a training's own values, against float64",
        caption=f"mean (worst) over all linears, at steps {', '.join(map(str, steps))}; SQNR in dB\n"
        "low tokens: the lower tenth; 0: gradient elements that become 0",
    )
    for name in ("recipe", *SQNR.values(), *ZEROED.values()):
        found.add_column(name, justify="left" if name == "recipe" else "right")
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        cells = []
        for figure in (*SQNR, *ZEROED):
            places = (place for row in rows if row["recipe"] == recipe for place in row["places"].values())
            values = [value for place in places for value in place[figure]]
            worst, form = (min(values), ".1f") if figure in SQNR else (max(values), ".2%")
            cells.append(f"{statistics.fmean(values):{form}} ({worst:{form}})")
        found.add_row(recipe, *cells)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Train, measure, append the rows and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.fp8_products",
        description="Measure 8-bit products of the values of a real training against float64.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of the training (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows (default bench/results)")
    parser.add_argument("--tiny", action="store_true", help="a model of 120 thousand weights on short rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    about = about_run(THREADS, 1)
    rows = [{**about, **row} for row in measured(options.steps, options.tiny)]
    append(rows, options.out)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
