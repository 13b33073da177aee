"""The command line of the benchmarks."""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from bench.cases import CASES
from bench.compare import RedTests, Row, append, check_tests, compare

EXAMPLE = """example:
  python -m bench linear_cross_entropy --tokens 8192 --dtype bfloat16 --ignored 0.5

The operation's tests run first, and no speed is printed unless they are green. Each repetition of each variant runs in a process
of its own, in alternating order. Peaks are over the inputs. Rows are appended to bench/results/."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark that the command line names; the exit code is 1 where its tests are red."""
    options = vars(_parser().parse_args(arguments))
    case = CASES[options["case"]]
    defaults = case.quick if options["quick"] else case.sizes
    sizes = {name: default if options[name] is None else options[name] for name, default in defaults.items()}
    console = Console()
    console.print(f"{case.name}: running its tests ...")
    try:
        check_tests(case)
    except RedTests as red:
        console.print(str(red), markup=False, highlight=False)
        console.print(f"{case.name}: its tests are red, so no speed is measured.")
        return 1
    rows = list(compare(case, sizes, options["dtype"], options["repetitions"], options["threads"]))
    console.print(_table(case.about, rows))
    path = append(rows)
    console.print(f"{len(rows)} rows appended to bench/results/{path.name}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure an operation against what a model does without it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cases = parser.add_subparsers(dest="case", required=True, metavar="CASE")
    for case in CASES.values():
        one = cases.add_parser(case.name, help=case.about, description=case.about)
        for name, default in case.sizes.items():
            one.add_argument(
                f"--{name}", type=type(default), help=f"default {default}; {case.quick[name]} with --quick"
            )
        one.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
        one.add_argument("--repetitions", type=_positive, default=2, help="processes a variant (default 2)")
        one.add_argument("--threads", type=_positive, default=1, help="threads of torch on a CPU (default 1)")
        one.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _table(about: str, rows: list[Row]) -> Table:
    first = rows[0]
    sizes = ", ".join(f"{name} {value}" for name, value in first["sizes"].items())
    where = f"{first['device_name']} {first['arch']}, torch {first['versions']['torch']}"
    caption = f"{sizes}, {first['dtype']}; {where}, {first['threads']} thread(s); median of {first['repetitions']}"
    table = Table(title=about, caption=caption)
    for column in (
        "variant",
        "seconds",
        "fastest",
        "CPU s",
        "TFLOP/s",
        "extra MB",
        "time",
        "memory",
    ):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        seconds, peak = row["seconds"], row["extra_peak_bytes"]
        table.add_row(
            row["variant"],
            f"{seconds['p50']:.4g}",
            f"{seconds['min']:.4g}",
            f"{row['cpu_seconds']['p50']:.4g}",
            f"{row['flops'] / seconds['p50'] / 1e12:.3g}",
            f"{peak / 1e6:.1f}",
            f"{seconds['p50'] / first['seconds']['p50']:.2f}x",
            f"1/{first['extra_peak_bytes'] / peak:.1f}" if peak else "-",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
