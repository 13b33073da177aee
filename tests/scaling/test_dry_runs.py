"""The dry runs in docs/scaling.md are what the command prints.

python -m tests.scaling.test_dry_runs      # writes them
"""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from automodel_accel.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"
RUN = re.compile(r"^```text\n\$ automodel-accel (?P<command>.*)\n(?P<printed>(?:(?!```).*\n)*)```$", re.MULTILINE)
RUNS = list(RUN.finditer(PAGE.read_text(encoding="utf-8")))


def printed(command: str) -> str:
    arguments = [str(ROOT / word) if word.endswith(".json") else word for word in shlex.split(command)]
    result = CliRunner(env={"COLUMNS": "118"}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("run", RUNS, ids=[run["command"].split()[1] for run in RUNS])
def test_is_what_the_command_prints(run: re.Match[str]) -> None:
    assert run["printed"] == printed(run["command"]), "python -m tests.scaling.test_dry_runs writes it"


def test_the_page_has_dry_runs() -> None:
    assert len(RUNS) >= 3


if __name__ == "__main__":
    filled = RUN.sub(
        lambda run: f"```text\n$ automodel-accel {run['command']}\n{printed(run['command'])}```", PAGE.read_text()
    )
    PAGE.write_text(filled)
