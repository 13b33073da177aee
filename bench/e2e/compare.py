"""Run all variants of a job, each run in a process of its own and in alternating order, and make rows of the figures."""

import datetime
import functools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from automodel_accel.flops import vendor_peak
from automodel_accel.kernels.facts import this_machine
from bench.e2e import documents
from bench.e2e.agreement import curves, gradients
from bench.e2e.flops import Flops, step_flops
from bench.e2e.job import Job, Measurement
from bench.e2e.shapes import shape_of
from bench.e2e.variants import OURS, VANILLA, parse
from bench.fp8 import is_other_arithmetic

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
Trained = dict[str, Any]  # losses and gradients, and those of the trainings from moved weights
MOVED = (1, 2)
THREADS = 1  # of torch on a CPU: more than there are free cores spin while they wait
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory")
OPTIMIZER_STATES, FULL = 2, 0.97  # AdamW's, in the weights' dtype; the share of the memory that tensors can have


@dataclass(frozen=True, slots=True)
class Run:
    """One process: a variant, and which of its repetitions it is."""

    variant: str
    repetition: int

    @property
    def moved(self) -> tuple[int, ...]:
        """Seeds of the trainings from moved weights, after the one that is measured: vanilla's first process does them."""
        return MOVED if self.variant == VANILLA and self.repetition == 0 else ()


def runs_of(variants: Sequence[str], repetitions: int) -> list[Run]:
    """The runs in alternating order."""
    found = []
    for repetition in range(repetitions):
        found += [Run(name, repetition) for name in (variants if repetition % 2 == 0 else reversed(variants))]
    return found


class Comparison:
    """The runs of some jobs, which share processes: one run trains one variant on every job, one after the other.

    Give it one job where memory and speed count, and several where seconds of start-up would.
    """

    def __init__(
        self, jobs: Sequence[Job], variants: Sequence[str], repetitions: int, texts: documents.Documents
    ) -> None:
        self.jobs, self.variants, self.repetitions, self.texts = list(jobs), list(variants), repetitions, texts
        self.skipped: dict[str, str] = {}
        self.measured: dict[str, list[list[Measurement]]] = {}
        self.trained: dict[str, list[Trained]] = {}
        for variant in variants:
            if reason := self._why_not(variant):
                self.skipped[variant] = reason
        self.runs = runs_of([variant for variant in variants if variant not in self.skipped], repetitions)

    def run(self, deadline: float, told: Callable[[Run], None]) -> None:
        """Run everything; what has not begun at `deadline` (of `time.monotonic`) is skipped."""
        with tempfile.TemporaryDirectory() as folder:
            texts = Path(folder) / "documents.json"
            documents.write(self.texts, texts)
            for run in self.runs:
                told(run)
                left = deadline - time.monotonic()
                if run.variant in self.skipped and run.variant not in self.measured:
                    continue
                reason = self._one(run, texts, Path(folder), left) if left > 0 else "not run: the time was up."
                if reason and run.variant not in self.measured:
                    self.skipped[run.variant] = reason

    def rows(self) -> Iterator[Row]:
        """A row for every job and variant; one that was skipped says why."""
        about = _about()
        for number, job in enumerate(self.jobs):
            batches = documents.batches(self.texts, job)
            job_about = {**about, **_job_about(job, batches, self.texts)}
            for variant in self.variants:
                row = {**job_about, "variant": variant}
                if variant in self.measured:
                    runs = [measured[number] for measured in self.measured[variant]]
                    row |= figures(runs, job_about) | self._agreement(variant, number)
                else:
                    row |= {"skipped": self.skipped[variant]}
                yield row

    def _why_not(self, variant: str) -> str | None:
        facts = this_machine()
        kind, _ = parse(variant)
        for job in self.jobs:
            if reason := kind.why_not(job, facts) or _too_large(job, facts.memory_bytes):
                return reason
        return None

    def _one(self, run: Run, texts: Path, folder: Path, seconds: float) -> str | None:
        """Run one process. Returns why it gave no measurement."""
        request = {
            "variant": run.variant,
            "jobs": [asdict(job) for job in self.jobs],
            "documents": str(texts),
            "folder": str(folder),
            "moved": run.moved,
        }
        command = [sys.executable, "-m", "bench.e2e.train", json.dumps(request)]
        environment = {**os.environ, "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)}
        limit = seconds if math.isfinite(seconds) else None
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s: the time was up."
        if done.returncode:
            return _sentence(done.stderr, done.returncode)
        measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
        self.measured.setdefault(run.variant, []).append([Measurement(**one) for one in measured])
        if run.repetition == 0:
            self.trained[run.variant] = [torch.load(folder / f"trained{number}.pt") for number in range(len(self.jobs))]
        return None

    def _agreement(self, variant: str, number: int) -> Row:
        """How near the variant's first run is to vanilla's first, beside how near vanilla from moved weights is."""
        if VANILLA not in self.trained or variant not in self.trained:
            return {}
        ours, vanilla = self.trained[variant][number], self.trained[VANILLA][number]
        return {
            **curves(ours["losses"], vanilla["losses"], [moved["losses"] for moved in vanilla["moved"]]),
            **gradients(ours["gradients"], vanilla["gradients"], [moved["gradients"] for moved in vanilla["moved"]]),
        }


def failed(rows: Sequence[Row]) -> list[str]:
    """What to end with exit code 1 for: our variants whose loss curve or gradients are not vanilla's, or that crashed.

    With fp8= they differ by design: rows say by how much.
    """
    found = []
    for row in rows:
        if row["variant"].split(":")[0] == OURS:
            title = f"{row['model']}, {row['method']}, {row['layout']} rows: {row['variant']}"
            as_designed = is_other_arithmetic(row["variant"])
            if row.get("loss_agrees") is False and not as_designed:
                found.append(f"{title}: loss {row['loss_difference']:.2g} off, {row['loss_allowed']:.2g} is allowed.")
            if row.get("gradients_agree") is False and not as_designed:
                what = f"{title}: gradient of {row['gradient_worst_parameter']}"
                found.append(
                    f"{what} {row['gradient_distance_worst']:.2g} off, {row['gradient_allowed']:.2g} is allowed."
                )
            if "crashed" in row.get("skipped", ""):
                found.append(f"{title}: {row['skipped']}")
    return found


def figures(runs: Sequence[Measurement], about: Row) -> Row:
    """The figures of a variant's repetitions; speed is by the median of their times."""
    totals = sorted(sum(run.seconds) for run in runs)
    middle = totals[len(totals) // 2] if len(totals) % 2 else sum(totals[len(totals) // 2 - 1 :][:2]) / 2
    first = runs[0]
    return {
        "seconds": middle,
        "seconds_of_runs": [sum(run.seconds) for run in runs],
        "step_seconds": [run.seconds for run in runs],
        "cpu_seconds": min(run.cpu_seconds for run in runs),
        "tokens_per_second": about["tokens"] / middle,
        "flops_per_second": about["flops"] / middle,
        "mfu": about["flops"] / middle / about["peak_flops"],
        "peak_memory_bytes": max(run.peak_memory_bytes for run in runs),
        "memory_before_bytes": first.memory_before_bytes,
        "parameters": first.parameters,
        "trainable": first.trainable,
        "versions": {**about["versions"], **first.versions},
        "losses": first.losses,
        "report": first.report,
    }


def _job_about(job: Job, batches: list[documents.Batch], texts: documents.Documents) -> Row:
    """What the job asks for; tokens and FLOPs are those of the timed steps of one run."""
    shape, timed = shape_of(job.model, job.layers), batches[job.warmup :]
    of_steps = [step_flops(shape, batch.tokens, batch.pairs, job.method, job.rank) for batch in timed]
    parts = {name: sum(getattr(one, name) for one in of_steps) for name in Flops.__dataclass_fields__}
    facts = this_machine()
    return {
        **asdict(job),
        "layers": shape.layers,
        "optimizer": "AdamW(fused=True)",
        "data": {"source": texts.source, "documents": len(texts.tokens)},
        "tokens": sum(batch.tokens for batch in timed),
        "padded_tokens": sum(batch.tensors["input_ids"].numel() for batch in timed),
        "longest_document": max(max(batch.lengths) for batch in timed),
        "flops": sum(parts.values()),
        "flops_by_part": parts,
        **_peak_flops(facts.device_name, job.dtype),
    }


@functools.cache
def _peak_flops(device_name: str, dtype: str) -> Row:
    """By the data sheet; measured on a GEMM where there is none."""
    if listed := vendor_peak(device_name, dtype):
        return {"peak_flops": listed, "peak_source": "data sheet"}
    device, size = ("cuda", 8192) if this_machine().device == "cuda" else ("cpu", 768)
    x = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(x, x)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return {"peak_flops": 2 * size**3 / min(seconds), "peak_source": f"measured, a GEMM of {size}"}


def _about() -> Row:
    facts = this_machine()
    return {
        "case": "e2e",
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": facts.device,
        "device_name": facts.device_name,
        "arch": facts.arch,
        "memory_bytes": facts.memory_bytes,
        "os": platform.system(),
        "threads": THREADS,
        "versions": {"python": facts.python},
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ":!bench/results")),
    }


def _git(*arguments: str) -> str | None:
    """What git says; None outside a checkout."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _too_large(job: Job, memory_bytes: int) -> str | None:
    """A sentence where weights, gradients and optimizer states alone are more than the memory."""
    shape, itemsize = shape_of(job.model, job.layers), getattr(torch, job.dtype).itemsize
    tensors = 2 + OPTIMIZER_STATES if job.method == "full" else 1
    needed = shape.parameters * itemsize * tensors
    if needed <= FULL * memory_bytes:
        return None
    what = "weights, gradients and optimizer states" if job.method == "full" else "weights"
    return f"{what} alone take {needed / 1e9:.0f} GB of {memory_bytes / 1e9:.0f} GB."


def _sentence(stderr: str, code: int) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else f"exit code {code}"
    if any(word in stderr for word in OUT_OF_MEMORY):
        return f"does not fit: {last}"
    return f"crashed: {last}"
