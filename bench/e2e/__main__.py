"""The command line of the end-to-end benchmark."""

import argparse
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from automodel_accel.kernels.facts import this_machine
from bench.e2e import documents
from bench.e2e.compare import Comparison, Row, failed
from bench.e2e.job import LAYOUTS, METHODS, Job
from bench.e2e.shapes import SHAPES, shape_of
from bench.e2e.variants import OURS, VANILLA, VARIANTS, parse

WIDTH = 110  # of tables in a file
COLUMNS = (
    "variant",
    "tokens/s",
    "speed",
    "MFU",
    "peak GB",
    "memory",
    "CPU s",
    "loss",
    "allowed",
    "gradient",
    "allowed",
)
RESULTS = Path(__file__).resolve().parents[1] / "results"
EXAMPLE = """examples:
  python -m bench e2e --models Llama-3.2-1B --methods full --variants vanilla liger ours ours:recompute=selective --plot
  python -m bench e2e --tiny                  a model of 127 thousand weights, in seconds, to see that it works

Each repetition of each variant trains in a process of its own, in alternating order; what is not installed or does not fit
is skipped with a sentence. Tokens are real ones, padding apart. FLOPs are the model's own (see bench/e2e/flops.py): MFU is
those over time and the vendor's dense 16-bit rate, or a GEMM's measured one where there is none. The exit code is 1 where a
loss curve of ours is farther from vanilla's than rounding explains (more than twice as far as vanilla from weights moved by
a rounding), or a parameter's gradient is; see bench/e2e/agreement.py. Rows are appended to e2e.jsonl."""


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; the exit code is 1 where ours does not train as vanilla does."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
    try:
        comparisons = _comparisons(options)
    except ValueError as error:
        parser.error(str(error))
    deadline = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "e2e.jsonl"
    rows: list[Row] = []
    with tqdm(total=sum(len(one.runs) for one in comparisons), unit="run", disable=None) as bar:
        for comparison in comparisons:

            def tell(run: object, title: str = comparison.jobs[0].title) -> None:
                bar.set_description(f"{title}: {getattr(run, 'variant', run)}")
                bar.update()

            comparison.run(deadline, tell)
            found = list(comparison.rows())
            with path.open("a", encoding="utf-8") as file:  # at once, so that a later failure loses nothing
                file.writelines(json.dumps(row) + "\n" for row in found)
            rows += found
    for _, group in itertools.groupby(rows, key=_key):
        console.print(table(list(group)))
    console.print(f"{len(rows)} rows appended to {path}", soft_wrap=True)
    if options.plot:
        console.print(_plot(rows, options.plot), soft_wrap=True)
    problems = failed(rows)
    for problem in problems:
        console.print(problem, soft_wrap=True)
    return 1 if problems else 0


def table(rows: list[Row]) -> Table:
    """The rows of one job, side by side."""
    first = rows[0]
    title = f"{first['model']} ({first['layers']} layers), {first['method']}, {first['layout']} rows"
    caption = (
        "loss, gradient: distance to vanilla's, (!) where rounding does not explain it\n"
        f"{first['rows']} rows of at most {first['length']} tokens, {first['dtype']}, "
        f"{first['tokens']} tokens in {first['steps'] - first['warmup']} steps; {first['device_name']} {first['arch']}"
    )
    found = Table(title=title, caption=caption)
    for column in COLUMNS:
        found.add_column(column, justify="left" if column == "variant" else "right", overflow="fold")
    base = next((row for row in rows if row["variant"] == VANILLA and "seconds" in row), None)
    for row in rows:
        if "seconds" in row:
            found.add_row(row["variant"], *_cells(row, base))
    skipped = [f"{row['variant']}: {row['skipped']}" for row in rows if "skipped" in row]
    found.caption = "\n".join([caption, *skipped])
    return found


def _cells(row: Row, base: Row | None) -> list[str]:
    speed = f"{row['tokens_per_second'] / base['tokens_per_second']:.2f}x" if base else "-"
    memory = f"{row['peak_memory_bytes'] / base['peak_memory_bytes']:.2f}x" if base else "-"
    agreement = ["-"] * 4
    if "loss_difference" in row:
        marked = "" if row["loss_agrees"] else " (!)"
        agreement = [f"{row['loss_difference']:.1e}{marked}", f"{row['loss_allowed']:.1e}", "-", "-"]
    if row.get("gradient_distance") is not None:
        agreement[2:] = [
            f"{row['gradient_distance_worst']:.1e}" + ("" if row["gradients_agree"] else " (!)"),
            f"{row['gradient_allowed']:.1e}",
        ]
    return [
        f"{row['tokens_per_second']:.0f}",
        speed,
        f"{row['mfu']:.1%}",
        f"{row['peak_memory_bytes'] / 1e9:.2f}",
        memory,
        f"{row['cpu_seconds']:.2f}",
        *agreement,
    ]


def _key(row: Row) -> tuple[str, ...]:
    return row["model"], row["method"], row["layout"]


def _plot(rows: list[Row], path: Path) -> str:
    if not this_machine().has("matplotlib"):
        return "no picture: matplotlib is not installed."
    from bench.e2e.plot import draw

    drawn = draw(rows, path)
    return f"{path}: loss curves, speed and memory" if drawn else "no picture: nothing was measured."


def _comparisons(options: argparse.Namespace) -> list[Comparison]:
    variants = options.variants or (TINY_VARIANTS if options.tiny else DEFAULT_VARIANTS)
    for variant in variants:
        parse(variant)
    jobs = [
        Job(
            model=model,
            method=method,
            layout=layout,
            rows=options.rows,
            length=options.length,
            steps=options.steps,
            warmup=options.warmup,
            dtype=options.dtype,
            learning_rate=options.learning_rate,
            rank=options.rank,
            layers=options.layers,
            seed=options.seed,
        )
        for model, method, layout in itertools.product(options.models, options.methods, options.layouts)
    ]
    for job in jobs:
        shape_of(job.model)
    if options.tiny:
        jobs = [replace(job, **TINY) for job in jobs]
        unique = list(dict.fromkeys(jobs))
        return [Comparison(unique, variants, 1, documents.paragraphs_in_bytes())]
    texts = documents.read(options.documents) if options.documents else documents.packaged_documents()
    return [Comparison([job], variants, options.repetitions, texts) for job in jobs]


DEFAULT_VARIANTS = (*VARIANTS, f"{OURS}:recompute=selective")
TINY_VARIANTS = tuple(name for name in VARIANTS if name != "compile")  # which takes half a minute
TINY: dict[str, Any] = {
    "model": "tiny",
    "rows": 2,
    "length": 96,
    "steps": 5,
    "warmup": 2,
    "dtype": "float32",
    "learning_rate": 1e-3,
    "rank": 4,
    "layers": None,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench e2e",
        description="Train a model of random weights on real texts, and compare speed, memory and loss curve.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default_models = ["Llama-3.2-1B", "Llama-3-8B"]
    add(
        "--models",
        nargs="+",
        default=default_models,
        help=f"of {', '.join(SHAPES)} (default {' '.join(default_models)})",
    )
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: both")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    about = "; ".join(f"{name}: {variant.about}" for name, variant in VARIANTS.items())
    add("--variants", nargs="+", help=f"{about}, with settings as in ours:recompute=selective (default: all)")
    add("--rows", type=_positive, default=4, help="rows of a step (%(default)s)")
    add("--length", type=_positive, default=2048, help="tokens of a row at most (%(default)s)")
    add("--steps", type=_positive, default=20, help="of the loss curve (%(default)s)")
    add("--warmup", type=int, default=5, help="leading steps that are not timed (%(default)s)")
    add("--repetitions", type=_positive, default=2, help="processes a variant (%(default)s)")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of weights and optimizer (%(default)s)")
    add("--learning-rate", type=float, default=3e-4, help="of AdamW (%(default)s)")
    add("--rank", type=_positive, default=16, help="of the LoRA adapter (%(default)s)")
    add("--layers", type=_positive, help="of the model instead of its own number, to make it fit")
    add("--seed", type=int, default=0, help="of weights and data (%(default)s)")
    add("--documents", type=Path, help="file written by `python -m bench.e2e.documents FILE` (default: packaged texts)")
    add("--out", type=Path, default=RESULTS, help="folder of e2e.jsonl (default bench/results)")
    add("--seconds", type=float, default=float("inf"), help="begin nothing after this time, and end what runs")
    add("--plot", type=Path, metavar="PNG", help="draw loss curves, speed and memory")
    add("--tiny", action="store_true", help="a tiny model in float32 on short rows")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
