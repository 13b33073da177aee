"""The command line of the benchmarks."""

import argparse
import contextlib
import importlib
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from automodel_accel.kernels.facts import this_machine
from automodel_accel.kernels.fp8_linear.products import is_fast
from automodel_accel.kernels.preference import write_preferences
from bench import fp8, screen, tables
from bench import overhead as overheads
from bench.against import revision
from bench.case import Case, Operation
from bench.cases import cases, custom, pick, with_beside
from bench.operations import OPERATIONS
from bench.peers import PEERS
from bench.rows import Row, append, read
from bench.suite import Outcome, Settings, Suite, check_tests
from bench.variants import LAYERS

EXAMPLE = """examples:
  python -m bench kernels --op rms_norm,rope --peers liger,compile
  python -m bench kernels --quick
  python -m bench linear_cross_entropy --tokens 8192 --dtype bfloat16 --ignored 0.5
  python -m bench kernels --op rms_norm --against HEAD~5
  python -m bench lora --tokens 512 --rank 32
  python -m bench fp8 --tokens 512 --in-features 512 --out-features 2048
  python -m bench plot --to out/bench
  python -m bench tables --check

An operation's tests run first, and no speed of it is printed unless they are green. Every variant runs in a process of its own,
in alternating order. Rows are appended to bench/results/."""
OTHERS = {
    "e2e": "bench.e2e.__main__",
    "traffic": "bench.traffic",
    "packing": "bench.packing",
}  # they have command lines of their own
TOGETHER = {"lora": ("lora", "lora_layer")}  # commands that measure more than the operation of their name
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; the exit code is 1 where tests are red, or ours fails."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] and arguments[0] in OTHERS:
        return int(importlib.import_module(OTHERS[arguments[0]]).main(arguments[1:]))
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        if options.command == "tables":
            return tables.main(Path(options.page), options.check, console)
        if options.command == "plot":
            return _plot(Path(options.to), console)
        if options.command == "preferences":
            return _preferences(console)
        return _measure(options, console)
    except ValueError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 2


def _measure(options: argparse.Namespace, console: Console) -> int:
    with contextlib.ExitStack() as stack:
        others = (stack.enter_context(revision(options.against)),) if options.against else ()
        device = this_machine().device
        settings = Settings(
            repetitions=options.repetitions,
            seconds=options.seconds,
            threads=options.threads,
            peers=tuple(options.peers),
            others=others,
        )
        dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
        chosen = {operation.name: _cases(operation, options, device, dtype) for operation in pick(options.op)}
        if device == "cpu" and options.command == "kernels":
            console.print(
                "There is no GPU: sizes are cut to what a CPU does in seconds, and peers that need one are left out."
            )
        if "fp8" in chosen and not is_fast(this_machine().arch):
            console.print(
                f"{this_machine().arch} multiplies 8-bit values no faster than others, or emulates it: no gain is to be seen."
            )
        _warn_of_load(console)
        outcomes, red = _run(chosen, settings, options.minutes, console)
        rows = [row for outcome in outcomes for row in outcome.rows]
        for table in (*overheads.tables(rows), *fp8.tables(rows)):
            console.print(table)
        if others:
            console.print(screen.against(outcomes, others[0].name))
    if options.plot:
        _plot(Path(options.plot), console)
    return int(red or any(outcome.broken for outcome in outcomes))


def _warn_of_load(console: Console) -> None:
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load > processors / 2:
        console.print(
            f"This machine is busy: {load:.1f} processes on {processors} processors. Times of a CPU will be noise."
        )


def _cases(operation: Operation, options: argparse.Namespace, device: str, dtype: str) -> list[Case]:
    if options.command == "kernels":
        return cases(operation, device, dtype, options.models, options.tokens, options.quick)
    sizes = {name: getattr(options, name) for name in operation.custom}
    return with_beside(operation, custom(operation, sizes, dtype))


def _run(
    chosen: dict[str, list[Case]], settings: Settings, minutes: float, console: Console
) -> tuple[list[Outcome], bool]:
    """What was measured, and whether tests are red. On a GPU all tests run first, at once, beside processes that load libraries."""
    outcomes: list[Outcome] = []
    told, end = set[str](), time.monotonic() + 60 * minutes
    bar = screen.progress(console)
    task = bar.add_task("tests", total=None)
    on_gpu = this_machine().device == "cuda"
    left = {name: cases for name, cases in chosen.items() if cases}
    with bar, Suite(settings, lambda what: bar.update(task, advance=1, description=what)) as suite:
        bar.update(task, total=sum(map(suite.planned, left.values())))
        if on_gpu:
            suite.start([case for cases in left.values() for case in cases[:1]])
        red = check_tests([OPERATIONS[name] for name in left], at_once=True) if on_gpu else {}
        for number, (name, cases) in enumerate(left.items()):
            bar.update(task, description=f"{name}: its tests")
            red |= {} if on_gpu else check_tests([OPERATIONS[name]])
            if name in red:
                console.print(red[name], markup=False, highlight=False)
                console.print(f"{name}: its tests are red, so no speed is measured.")
                continue
            until = time.monotonic() + (end - time.monotonic()) / (len(left) - number)
            found = list(suite.run(cases, until))
            outcomes += found
            append(row for outcome in found for row in outcome.rows)
            _show(found, console, told)
    if outcomes:
        rows = sum(len(outcome.rows) for outcome in outcomes)
        names = sorted({outcome.case.operation for outcome in outcomes})
        console.print(f"{rows} rows appended to bench/results/: {', '.join(f'{name}.jsonl' for name in names)}")
    return outcomes, bool(red)


def _show(outcomes: Sequence[Outcome], console: Console, told: set[str]) -> None:
    for outcome in outcomes:
        if outcome.rows:
            console.print(screen.table(outcome))
        for name, reason in outcome.skipped.items():
            about = PEERS[name].about if name in PEERS else name
            sentence = f"Not measured: {outcome.case.operation} by {name} ({about}): {reason}."
            if sentence not in told:
                told.add(sentence)
                console.print(sentence, markup=False, highlight=False)


def _plot(folder: Path, console: Console) -> int:
    try:
        plot = importlib.import_module("bench.plot")
    except ImportError as error:
        raise ValueError(f"pictures need matplotlib ({error}); pip install 'automodel-accel[demo]'") from error
    for path in plot.draw(read(), folder):
        console.print(str(path), markup=False, highlight=False)
    return 0


def _preferences(console: Console) -> int:
    rows = [row for row in read() if _prefers(row)]
    if not rows:
        raise ValueError(
            "there are no rows of a GPU in bench/results/, so there is nothing to prefer; run kernels on one."
        )
    console.print(f"{len(write_preferences(rows))} preferences written")
    return 0


def _prefers(row: Row) -> bool:
    """Whether a row says which implementation of a kernel is fast."""
    whole = row["device"] != "cpu" and not row["cut"] and "@" not in row["variant"]
    return whole and row["operation"] not in LAYERS and row["sizes"].get("rank") != 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure operations against what models do without them, and against other libraries.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    kernels = commands.add_parser("kernels", help="every operation, at the sizes of real models")
    kernels.add_argument("--op", type=_names, default=[], help=f"of {', '.join(OPERATIONS)}; default all")
    kernels.add_argument("--models", type=_names, default=[], help="real models; default a list that fits the device")
    kernels.add_argument("--tokens", type=_numbers, default=[], help="numbers of tokens; default likewise")
    kernels.add_argument("--quick", action="store_true", help="sizes that take no time, to see that it works")
    _add_measuring(kernels)
    commands.add_parser("traffic", help="bytes moved and launches, counted on a CPU", add_help=False)
    commands.add_parser("e2e", help="training, end to end", add_help=False)
    for operation in OPERATIONS.values():
        one = commands.add_parser(operation.name, help=f"{operation.about}, at sizes of your own")
        together = TOGETHER.get(operation.name, (operation.name,))
        sizes = {name: size for each in together for name, size in OPERATIONS[each].custom.items()}
        for name, default in sizes.items():
            one.add_argument(
                f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default}"
            )
        one.set_defaults(op=list(together))
        _add_measuring(one)
    page = commands.add_parser("tables", help="write the tables of a page from the rows")
    page.add_argument("page", nargs="?", default="README.md", help="default README.md")
    page.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where a table is not what the rows say"
    )
    pictures = commands.add_parser("plot", help="pictures and one HTML page from the rows")
    pictures.add_argument("--to", default="out/bench", help="folder; default out/bench")
    commands.add_parser("preferences", help="write which of our implementations is fastest on the GPUs that have rows")
    return parser


def _add_measuring(one: argparse.ArgumentParser) -> None:
    one.add_argument("--dtype", choices=DTYPES, help="default bfloat16 on a GPU, float32 on a CPU")
    one.add_argument("--repetitions", type=_positive, default=2, help="times that each variant is asked (default 2)")
    one.add_argument("--seconds", type=float, default=2.0, help="to measure a case, all variants together (default 2)")
    one.add_argument("--minutes", type=float, default=math.inf, help="begin no case later; shared by the operations")
    one.add_argument("--threads", type=_positive, default=1, help="threads of torch on a CPU (default 1)")
    one.add_argument(
        "--peers", type=_names, default=[], help=f"of {', '.join(PEERS)}; default all; eager and ours always"
    )
    one.add_argument("--against", metavar="REV", help="also measure ourselves at another revision")
    one.add_argument("--plot", metavar="FOLDER", nargs="?", const="out/bench", help="draw pictures at the end")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    return [_positive(number) for number in _names(text)]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
