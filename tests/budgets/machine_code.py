"""What the machine code of every kernel needs, compiled ahead of time for every target, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.budgets.ledger import Figures

ROOT = Path(__file__).parents[2]
COUNTED = ("registers", "spilled", "shared", "widest", "narrow")
Row = dict[str, Any]


def compiled(operation: str) -> list[Row]:
    """What `tests.ops.aot` says about one operation: one row for each kernel, case and target."""
    command = ["env", "-u", "TRITON_INTERPRET", sys.executable, "-m", "tests.ops.aot", operation]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def figures(rows: list[Row]) -> Figures:
    """One figure for each row: registers of a thread, bytes spilled and shared, widest and narrow accesses."""
    return {_name(row): {key: row[key] for key in COUNTED} for row in rows}


def _name(row: Row) -> str:
    return f"{row['case'].replace('torch.', '')} / {row['kernel']} / {row['target']}"
