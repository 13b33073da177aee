"""Run all variants of a case, each repetition in a process of its own and in alternating order, and make rows of the figures."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from automodel_accel.kernels.facts import this_machine
from bench.case import Case, Sizes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


class RedTests(Exception):
    """The tests of the operation fail; holds what pytest said."""


def check_tests(case: Case) -> None:
    """Run the case's tests.

    Raises:
        RedTests: they do not pass, so that no speed may be printed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *case.tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RedTests(done.stdout[-3000:] + done.stderr[-3000:])


def compare(case: Case, sizes: Sizes, dtype: str, repetitions: int, threads: int) -> Iterator[Row]:
    """Measure every variant `repetitions` times; one row a variant."""
    found: dict[str, list[Row]] = {variant: [] for variant in case.variants}
    for repetition in range(repetitions):
        order = list(case.variants)
        for variant in order if repetition % 2 == 0 else reversed(order):
            found[variant].append(_measure(case, variant, sizes, dtype, threads))
    about = _about(case, sizes, dtype, repetitions, threads)
    for variant, measured in found.items():
        seconds = [value for one in measured for value in one["seconds"]]
        cpu_seconds = [value for one in measured for value in one["cpu_seconds"]]
        peak = max(one["extra_peak_bytes"] for one in measured)
        figures = {"seconds": _quantiles(seconds), "cpu_seconds": _quantiles(cpu_seconds), "extra_peak_bytes": peak}
        yield {**about, "variant": variant, **figures}


def append(rows: list[Row]) -> Path:
    """Append the rows to the case's file of results."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{rows[0]['case']}.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _measure(case: Case, variant: str, sizes: Sizes, dtype: str, threads: int) -> Row:
    request = json.dumps({"case": case.name, "variant": variant, "sizes": dict(sizes), "dtype": dtype})
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "bench.measure", request]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {variant} failed at {dict(sizes)} {dtype}:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _about(case: Case, sizes: Sizes, dtype: str, repetitions: int, threads: int) -> Row:
    facts = this_machine()
    return {
        "case": case.name,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": facts.device,
        "device_name": facts.device_name,
        "arch": facts.arch,
        "memory_bytes": facts.memory_bytes,
        "os": platform.system(),
        "threads": threads,
        "versions": {"python": facts.python, "torch": facts.torch, **_packages()},
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ":!bench/results")),
        "sizes": dict(sizes),
        "dtype": dtype,
        "repetitions": repetitions,
        "flops": case.flops(sizes),
        "bytes_floor": case.bytes_floor(sizes, getattr(torch, dtype).itemsize),
    }


def _packages() -> dict[str, str]:
    return {name: version(name) for name in ("triton",) if this_machine().has(name)}


def _git(*arguments: str) -> str | None:
    """What git says; None outside a checkout."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _quantiles(values: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {"min": min(values), "p20": deciles[1], "p50": deciles[4], "p80": deciles[7], "max": max(values)}
