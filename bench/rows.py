"""Rows: what was measured, on what, from which commit; one line of JSON each, in bench/results/."""

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from automodel_accel.kernels.facts import this_machine
from bench.case import Case
from bench.operations import OPERATIONS
from bench.variants import ROOT, Variant, asked

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


def about_run(threads: int, repetitions: int) -> Row:
    """What all rows of a run have in common: the machine, the versions, the commit."""
    facts = this_machine()
    versions = {"python": facts.python, "torch": facts.torch, **dict(facts.packages)}
    if facts.device == "cuda":
        versions["cuda"] = torch.version.cuda or torch.version.hip or "none"
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": facts.device,
        "device_name": facts.device_name,
        "arch": facts.arch,
        "memory_bytes": facts.memory_bytes,
        "processors": facts.processors,
        "os": platform.system(),
        "threads": threads,
        "versions": versions,
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", ":!bench/results")),
        "repetitions": repetitions,
        "load": round(os.getloadavg()[0], 2),  # processes that ran or waited in the last minute, before this run
    }


def row_of(about: Row, case: Case, variant: Variant, measured: Sequence[Mapping[str, Any]], rates: Row) -> Row:
    """The row of one variant of one case, from the measurements of all its repetitions."""
    operation, dtype = OPERATIONS[case.operation], getattr(torch, case.dtype)
    flops, floor = operation.flops(case.sizes), operation.bytes_floor(case.sizes, dtype.itemsize)
    times = {
        name: quantiles([value for one in measured for value in one[name]])
        for name in ("seconds", "forward_seconds", "cpu_seconds", "host_seconds")
    }
    median = times["seconds"]["p50"]
    return {
        "case": case.operation,
        "operation": case.operation,
        "model": case.model,
        "variant": variant.name,
        "implementation": variant.implementation,
        "package": variant.peer.package,
        "version": variant.peer.version() if variant.peer.package else about["commit"],
        "sizes": dict(case.sizes),
        "options": dict(case.options),
        "features": sorted(asked(case)),
        "cut": case.cut,
        "dtype": case.dtype,
        **about,
        **times,
        "iterations": [len(one["seconds"]) for one in measured],
        "repetition_seconds": [statistics.median(one["seconds"]) for one in measured],
        "extra_peak_bytes": max((one["extra_peak_bytes"] or 0 for one in measured), default=0),
        "error": measured[0]["error"],
        "flops": flops,
        "bytes_floor": floor,
        "rates": rates,
        "share_of_copy": floor / median / rates["copy_bytes_per_second"],
        "share_of_matmul": flops / median / rates["matmul_flops_per_second"],
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Least, a fifth, half, four fifths, most."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else list(values) * 9
    return {"min": min(values), "p20": deciles[1], "p50": deciles[4], "p80": deciles[7], "max": max(values)}


def ratio(row: Row, other: Row) -> tuple[float, float, float]:
    """Time of a row as a share of another's: of the medians, and the least and most of any one repetition."""
    pairs = zip(row["repetition_seconds"], other["repetition_seconds"], strict=False)
    single = [one / its for one, its in pairs]
    middle = row["seconds"]["p50"] / other["seconds"]["p50"]
    return middle, min(single, default=middle), max(single, default=middle)


def append(rows: Iterable[Row], results: Path | None = None) -> list[Path]:
    """Append rows to the files of their operations."""
    folder = results or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[Path, None] = {}
    for row in rows:
        path = folder / f"{row['case']}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        written[path] = None
    return list(written)


def read(results: Path | None = None) -> list[Row]:
    """All rows of the operations in a folder of results, oldest first; rows of other benchmarks are left out."""
    found = []
    for path in sorted((results or RESULTS).glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines() if line]
        found += [row for row in rows if "repetition_seconds" in row]
    return sorted(found, key=lambda row: str(row["time"]))


def git(*arguments: str) -> str | None:
    """What git says; None outside a checkout."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
