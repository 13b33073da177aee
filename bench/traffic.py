"""Bytes moved, launches and saved bytes, counted on a CPU: tables of ours beside vanilla and Liger. `python -m bench traffic`.

Nothing here is a speed. The counting is that of `tests.budgets`, in a process of its own: Triton interprets or compiles for the
whole life of a process.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; the exit code is 1 where the counting failed."""
    parser = argparse.ArgumentParser(prog="python -m bench traffic", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="rows as JSON lines instead of tables")
    as_json = parser.parse_args(arguments).json
    console = Console()
    for module, table in (("traffic", _traffic), ("layers", _layers)):
        command = [sys.executable, "-m", f"tests.budgets.{module}"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            console.print(f"counting failed:\n{done.stderr[-3000:]}", markup=False, highlight=False)
            return 1
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        if as_json:
            sys.stdout.write(done.stdout)
        else:
            console.print(table(rows))
    return 0


def _traffic(rows: list[Row]) -> Table:
    first = rows[0]
    table = Table(
        title="Bytes moved, over the floor (every load and store counts; no cache)",
        caption=f"{first['dtype']}, {first['rows']} rows of {first['hidden']}, {first['programs']} persistent programs of ours; "
        "Liger's backward of a norm has one program here, which spares it partial sums",
    )
    for column in ("operation", "", "ours", "Liger", "launches: ours", "Liger"):
        table.add_column(column, justify="left" if column in ("operation", "") else "right")
    by_key = {(row["operation"], row["direction"], row["implementation"]): row for row in rows}
    for (operation, direction, implementation), row in by_key.items():
        if implementation == "ours":
            liger = by_key.get((operation, direction, "liger"))
            table.add_row(
                *(operation, direction, f"{row['ratio']:.3f}", f"{liger['ratio']:.3f}" if liger else "-"),
                *(str(len(row["launches"])), str(len(liger["launches"])) if liger else "-"),
            )
    return table


def _layers(rows: list[Row]) -> Table:
    table = Table(
        title="One decoder layer, forward and backward", caption="launches: a tiny model in Triton's interpreter"
    )
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    for column in ("figure", *names):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for figure in dict.fromkeys(row["figure"] for row in rows):
        found = {row["implementation"]: row["value"] for row in rows if row["figure"] == figure}
        table.add_row(figure, *(f"{found[name]:,.0f}" if name in found else "-" for name in names))
    return table


if __name__ == "__main__":
    sys.exit(main())
