"""Runs python in a process of its own, as a user does."""

import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path("tests", "loops", "scripts")
RUN = ("-m", "automodel_accel.run")
OURS = "automodel_accel: "  # how our lines on stderr begin


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str
    errors: str  # without our lines
    lines: tuple[str, ...]  # ours
    processor_seconds: float


def python(*words: str | Path) -> Outcome:
    """`python words...` in the root of the repository."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    every = done.stderr.splitlines(keepends=True)
    errors = "".join(line for line in every if not line.startswith(OURS))
    lines = tuple(line.removeprefix(OURS).rstrip() for line in every if line.startswith(OURS))
    return Outcome(done.returncode, done.stdout, errors, lines, spent)
