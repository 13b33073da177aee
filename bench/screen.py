"""Rows as tables on the screen."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bench.operations import OPERATIONS
from bench.peers import OURS
from bench.rows import Row, ratio
from bench.suite import Outcome

COLUMNS = ("variant", "time", "p20-p80", "host", "x first", "x best", "of limit", "MB")


def progress(console: Console) -> Progress:
    """A bar that says what is being measured, and how long it may still take."""
    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    )


def table(outcome: Outcome) -> Table:
    """One case: the first row is the baseline, "x best" is against the fastest of the others, the spread is over the median."""
    rows, case = outcome.rows, outcome.case
    first = rows[0]
    best = best_peer(rows)
    sizes = ", ".join(f"{name} {value}" for name, value in case.sizes.items())
    where = f"{first['device_name']} {first['arch']}, torch {first['versions']['torch']}"
    threads = f", {first['threads']} thread(s)" if first["device"] == "cpu" else ""
    cut = f"; cut: {case.cut}" if case.cut else ""
    versions = ", ".join(f"{row['variant']} {row['version']}" for row in rows if row["version"])
    measured = f"median of {first['repetitions']} runs of {first['iterations'][0]}; {versions}"
    shown = Table(
        title=f"{case.operation}: {case.label}{cut}",
        caption=f"{OPERATIONS[case.operation].about}, forward and backward; {sizes}; {case.dtype}; {where}{threads}; {measured}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        padding=(0, 1, 0, 0),
    )
    for column in COLUMNS:
        shown.add_column(
            "CPU" if column == "host" and first["device"] == "cpu" else column,
            justify="left" if column == "variant" else "right",
            no_wrap=True,
        )
    for row in rows:
        style = "bold" if row["variant"] == OURS else ""
        shown.add_row(*_cells(row, first, best), style=style)
    return shown


def _cells(row: Row, first: Row, best: Row | None) -> Iterator[str]:
    seconds = row["seconds"]
    chosen = f" ({row['implementation']})" if row["implementation"] and ":" not in row["variant"] else ""
    yield f"{row['variant']}{chosen}"
    yield duration(seconds["p50"])
    yield f"{seconds['p20'] / seconds['p50']:.2f}-{seconds['p80'] / seconds['p50']:.2f}"
    yield duration(row["cpu_seconds" if row["device"] == "cpu" else "host_seconds"]["p50"])
    yield f"{ratio(row, first)[0]:.2f}"
    yield "-" if best is None else f"{ratio(row, best)[0]:.2f}"
    yield limit(row)
    yield f"{row['extra_peak_bytes'] / 1e6:.1f}"


def limit(row: Row) -> str:
    """The share of the device's measured rate that bounds the operation: of its matrix products or of its copies."""
    of_copy, of_matmul = row["share_of_copy"], row["share_of_matmul"]
    return f"{of_matmul:.0%} matmul" if of_matmul > of_copy else f"{of_copy:.0%} copy"


def best_peer(rows: Sequence[Row]) -> Row | None:
    """The fastest row that is not ours."""
    theirs = [row for row in rows if not row["variant"].startswith(OURS)]
    return min(theirs, key=lambda row: float(row["seconds"]["p50"]), default=None)


def duration(seconds: float) -> str:
    """With three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def against(outcomes: Sequence[Outcome], name: str) -> Table:
    """Ourselves now, as a share of the time that another revision takes: the median, and the span of the repetitions."""
    shown = Table(title=f"Time of this tree over that of {name}")
    for column in ("operation", "case", "ratio", "span"):
        shown.add_column(column, justify="left" if column in ("operation", "case") else "right")
    for outcome in outcomes:
        rows = {row["variant"]: row for row in outcome.rows}
        if OURS in rows and name in rows:
            middle, least, most = ratio(rows[OURS], rows[name])
            shown.add_row(outcome.case.operation, outcome.case.label, f"{middle:.3f}", f"{least:.3f} - {most:.3f}")
    return shown
