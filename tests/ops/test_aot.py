"""Every kernel compiles for every target, without a GPU, and its machine code is as lean as its design says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.ops.aot_cases import CASES

ROOT = Path(__file__).parents[2]
REGISTERS = 65536  # of one streaming multiprocessor, in units of 256 for each warp
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 64 * 1024}
WIDEST = {"sm_80": 16, "sm_90": 16, "sm_100": 16, "gfx942": 8}  # twice the lanes share a row there


@pytest.fixture(scope="module", params=CASES)
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What `tests.ops.aot` says about one operation: one row for each kernel, case and target."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.aot", request.param]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_each_case_launches_a_kernel_on_each_target(compiled: list[dict[str, Any]]) -> None:
    found = {(row["case"], row["target"]) for row in compiled}
    operation = compiled[0]["case"].partition("/")[0]
    assert found == {(case.name, target) for case in CASES[operation] for target in SHARED}


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if row["spilled"] and not row["may_spill"]] == []


def test_global_memory_is_read_and_written_in_wide_words(compiled: list[dict[str, Any]]) -> None:
    assert [
        row for row in compiled if row["widest"] < WIDEST[row["target"]] or row["narrow"] > row["single_values"]
    ] == []


def test_a_program_has_at_most_1024_threads(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if row["threads"] > 1024] == []


def test_the_programs_meant_to_run_side_by_side_fit_on_a_multiprocessor(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        by_memory = SHARED[row["target"]] // (row["shared"] + 1024)  # the system keeps 1 KiB of each program's
        by_registers = REGISTERS // (row["threads"] * -(-row["registers"] // 8) * 8)
        fit = by_memory if row["target"].startswith("gfx") else min(by_memory, by_registers)
        assert fit >= row["programs_per_processor"], row
