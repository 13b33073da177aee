"""Whether a model learns with 8-bit products what it learns with bfloat16 ones: `python -m bench.fp8_training`.

A decoder of Llama's structure learns Python's manual, a byte a token, from random weights: real text, and a head that does not
outweigh the layers. Weights, gradients and AdamW's states are float32 under bfloat16 autocast: weights in bfloat16 would round most
steps of AdamW away, a noise of its own. The baseline is `apply(model)`; beside it `apply(model, fp8=recipe)` trains from the same
weights on the same batches. The seed gives both: another seed starts from other weights and reads the text in another order.

Held-out loss: paragraphs that no run trains on, by the trained weights and plain bfloat16 linears, as a model is used afterwards.
The noise and the verdict: bench/fp8_curves.py.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

import automodel_accel as accel
from automodel_accel.config import FP8
from automodel_accel.kernels.facts import this_machine
from bench.e2e import documents
from bench.e2e.compare import THREADS
from bench.e2e.documents import Documents
from bench.e2e.job import Job
from bench.e2e.shapes import SHAPES, Shape
from bench.e2e.variants import fill, move_by_a_rounding
from bench.fp8_curves import BASELINE, FINAL, MOVED, Row, table, verdicts
from bench.rows import RESULTS, about_run, append

CASE = "fp8_training"
WIDTH = 150  # of a table in a file
HELD_OUT_EVERY, HELD_OUT_BATCHES = (
    10,
    12,
)  # of the paragraphs; of four times the rows of a step, which is all of them once
WARMUP = 0.05  # of the steps
MAX_NORM = 1.0  # of the gradient
DIGITS = 6  # of a loss in a row
EXAMPLE = """examples:
  python -m bench.fp8_training --plot docs/images/fp8_training.png        3 seeds of each recipe: 20 minutes on one core
  python -m bench.fp8_training --recipes rowwise --seeds 6 --steps 1000
  python -m bench.fp8_training --tiny --steps 12 --out out                in seconds, to see that it works

Rows are appended to fp8_training.jsonl. The exit code is 1 where a recipe lies outside of the noise of bfloat16."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every run has in common.

    Attributes:
        shape: Of the model.
        rows: Of a step.
        length: Bytes of a row.
        steps: Of a run.
        learning_rate: AdamW's highest.
    """

    shape: Shape
    rows: int
    length: int
    steps: int
    learning_rate: float

    def job(self, seed: int) -> Job:
        """As bench/e2e names it, for its data."""
        return Job(
            model="custom",
            method="full",
            layout="packed",
            rows=self.rows,
            length=self.length,
            steps=self.steps,
            warmup=0,
            dtype="float32",
            learning_rate=self.learning_rate,
            rank=1,
            seed=seed,
        )


SMALL = Setup(
    replace(
        SHAPES["tiny"], hidden=192, intermediate=512, layers=4, heads=6, head_dim=32, vocab=256, rope_theta=10000.0
    ),
    rows=2,
    length=256,
    steps=500,
    learning_rate=2e-3,
)
TINY = Setup(replace(SHAPES["tiny"], vocab=256), rows=2, length=64, steps=12, learning_rate=2e-3)


def device() -> str:
    """Of the runs."""
    return "cuda" if this_machine().device == "cuda" else "cpu"


def texts() -> tuple[Documents, Documents]:
    """Paragraphs to train on, and those held out; what the manual says several times it says here once."""
    found = documents.paragraphs_in_bytes()
    distinct = [list(text) for text in dict.fromkeys(map(bytes, found.tokens))]
    kept = [tokens for number, tokens in enumerate(distinct) if number % HELD_OUT_EVERY]
    return Documents(found.source, kept), Documents(found.source, distinct[::HELD_OUT_EVERY])


def build(setup: Setup, seed: int) -> Any:
    """The model in float32, with the weights of the seed."""
    auto: Any = AutoModelForCausalLM
    with torch.device(device()):
        model = auto.from_config(setup.shape.config(), dtype=torch.float32, attn_implementation="sdpa")
    fill(model, seed)
    return model


def training(model: Any, setup: Setup, seed: int, source: Documents) -> Iterator[torch.Tensor]:
    """Train: the loss of each step, once its gradients are there and before its update."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.learning_rate, fused=True)
    warmup = math.ceil(WARMUP * setup.steps)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, setup.steps)  # type: ignore[no-untyped-call]
    for batch in documents.batches(source, setup.job(seed)):
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        yield loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def loss_of(model: Any, batch: documents.Batch) -> torch.Tensor:
    """In nats a byte."""
    tensors = {name: column.to(device()) for name, column in batch.tensors.items()}
    with torch.autocast(device(), dtype=torch.bfloat16):
        loss: torch.Tensor = model(**tensors).loss
    return loss


def held_out_loss(model: Any, setup: Setup, held_out: Documents) -> float:
    """Mean over the same batches for every seed."""
    model.eval()
    job = replace(setup.job(0), rows=4 * setup.rows, steps=HELD_OUT_BATCHES)
    with torch.no_grad():
        losses = [loss_of(model, batch) for batch in documents.batches(held_out, job)]
    return torch.stack(losses).mean().item()


def run(recipe: str, seed: int, setup: Setup, bar: Any) -> Row:
    """Train once.

    Raises:
        RuntimeError: a recipe was asked for and no linear took it, or a bfloat16 one did.
    """
    trained_on, held_out = texts()
    model = build(setup, seed)
    if recipe == MOVED:
        move_by_a_rounding(model, seed)
    model = accel.apply(model, fp8=recipe if recipe in FP8 else False)
    start, losses = time.perf_counter(), []
    for loss in training(model, setup, seed, trained_on):
        losses.append(loss.item())
        bar.update()
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    seconds = time.perf_counter() - start
    calls = accel.report(model).counts.fused["fp8"]
    if bool(calls) is not (recipe in FP8):
        raise RuntimeError(f"{recipe}: {calls} linears were multiplied in 8 bits")
    held_out_value = held_out_loss(model, setup, held_out)
    last = losses[-FINAL:]
    return {
        "case": CASE,
        "recipe": recipe,
        "seed": seed,
        **asdict(setup),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": "float32",
        "autocast": "bfloat16",
        "data": trained_on.source,
        "fp8_calls": calls,
        "seconds": seconds,
        "final_loss": sum(last) / len(last),
        "held_out_loss": held_out_value,
        "losses": [round(loss, DIGITS) for loss in losses],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; the exit code is 1 where a recipe lies outside of the noise."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
    if not 1 <= options.seeds <= options.noise_seeds or options.noise_seeds < 2:
        parser.error("--noise-seeds: at least 2, for there is no noise of one seed, and as many as --seeds.")
    rows = _newest(options.out) if options.read else _train(options)
    if not rows:
        parser.error(f"--read: no rows in {options.out / CASE}.jsonl")
    console.print(table(rows))
    if options.plot:
        from bench.fp8_picture import draw  # matplotlib is optional

        draw(rows, options.plot)
        console.print(f"{options.plot}: the loss curves", soft_wrap=True)
    return int(not all(verdict.within for verdict in verdicts(rows)))


def _train(options: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(THREADS)
    setup = replace(TINY if options.tiny else SMALL, steps=options.steps)
    about = about_run(THREADS, 1)
    rows: list[Row] = []
    seeds = {BASELINE: options.noise_seeds, **dict.fromkeys(options.recipes, options.seeds)}
    runs = [(recipe, seed) for seed in range(options.noise_seeds) for recipe, its in seeds.items() if seed < its]
    with tqdm(total=len(runs) * setup.steps, unit="step", disable=None) as bar:
        for recipe, seed in runs:
            bar.set_description(f"{recipe}, seed {seed}")
            rows.append({**about, **run(recipe, seed, setup, bar)})
            append(rows[-1:], options.out)  # at once, so that a later failure loses nothing
    return rows


def _newest(folder: Path) -> list[Row]:
    """The newest row of each recipe and seed, of those trained as the last one was."""
    path = folder / f"{CASE}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    names = [field.name for field in fields(Setup)]
    alike = [row for row in rows if all(row[name] == rows[-1][name] for name in names)]
    return list({(row["recipe"], row["seed"]): row for row in alike}.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fp8_training",
        description="Train a small model with bfloat16 and with 8-bit products, and compare losses with the noise of seeds.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=SMALL.steps, help="of a run (%(default)s)")
    add(
        "--seeds",
        type=int,
        default=3,
        help="runs of each recipe, from other weights and in another order (%(default)s)",
    )
    add("--noise-seeds", type=int, default=6, help="runs of bfloat16, whose spread is the noise (%(default)s)")
    add(
        "--recipes",
        nargs="+",
        choices=(*FP8, MOVED),
        default=[*FP8, MOVED],
        help=f"of fp8=, and {MOVED}, bfloat16 from weights moved by a rounding (default: all)",
    )
    add("--out", type=Path, default=RESULTS, help="folder of fp8_training.jsonl (default bench/results)")
    add("--plot", type=Path, metavar="PNG", help="draw the curves")
    add(
        "--read",
        action="store_true",
        help="train nothing: judge and draw the newest rows in --out of each recipe and seed",
    )
    add("--tiny", action="store_true", help="a model of 140 thousand weights on short rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())
