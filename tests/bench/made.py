"""Rows of measurements that were not made, for what only reads rows."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.case import Case
from bench.cases import custom
from bench.operations import RMS_NORM
from bench.peers import EAGER, OURS, PEERS
from bench.rows import Row, about_run, row_of
from bench.variants import Variant

RATES = {"copy_bytes_per_second": 1e10, "matmul_flops_per_second": 1e12}
CASE = custom(RMS_NORM, {"tokens": 1000, "hidden": 100}, "float32")


def measured(*seconds: float, extra: int = 1_000_000) -> dict[str, Any]:
    """What a worker answers."""
    times = list(seconds)
    halves = [value / 2 for value in times]
    return {
        "seconds": times,
        "forward_seconds": halves,
        "cpu_seconds": times,
        "host_seconds": times,
        "extra_peak_bytes": extra,
        "error": 1e-7,
    }


def rows(
    case: Case = CASE, eager: Sequence[float] = (0.002,), ours: Sequence[float] = (0.001,), time: str = "2026-01-01"
) -> list[Row]:
    """One of eager and one of ours; a repetition a number."""
    about = {**about_run(1, len(eager)), "time": time}
    return [
        row_of(about, case, Variant(EAGER, PEERS[EAGER]), [measured(value) for value in eager], RATES),
        row_of(about, case, Variant(OURS, PEERS[OURS], "torch"), [measured(value, extra=10) for value in ours], RATES),
    ]


def asked() -> dict[str, Any]:
    """The case as a worker is told it."""
    return asdict(CASE)
