"""Measure cases: every variant in a process of its own, one at a time, in alternating order."""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from automodel_accel.kernels.facts import this_machine
from bench.case import Case, Operation
from bench.peers import OURS
from bench.rows import Row, about_run, row_of
from bench.variants import ROOT, Variant, take_part

PATIENCE = 240.0  # seconds that an answer may take beyond the time to measure
PREFIX = "ANSWER "
Answers = dict[str, list[dict[str, Any]]]  # of each variant, one a repetition


@dataclass(slots=True)
class Outcome:
    """What came of a case: its rows, and for each variant without one, why.

    Attributes:
        case: The case.
        rows: The baseline first, ourselves last.
        skipped: Variant -> a sentence.
        broken: Ours, where it failed.
    """

    case: Case
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to measure.

    Attributes:
        repetitions: Times that each variant is asked for each case.
        seconds: For one case, all variants and repetitions together, about; compilation comes on top.
        threads: Of torch on a CPU.
        peers: Only these beside eager and ourselves; all where empty.
        others: More variants, such as ourselves at another commit.
    """

    repetitions: int = 2
    seconds: float = 2.0
    threads: int = 1
    peers: tuple[str, ...] = ()
    others: tuple[Variant, ...] = ()


def check_tests(operations: Sequence[Operation], at_once: bool = False) -> dict[str, str]:
    """Run the operations' tests.

    Args:
        operations: Which.
        at_once: All at the same time, where there are processors for it.

    Returns:
        The operations whose tests do not pass, so that no speed of theirs may be printed, and what pytest said.
    """
    with ThreadPoolExecutor(len(operations) if at_once else 1) as pool:
        said = pool.map(_red, operations)
    return {operation.name: text for operation, text in zip(operations, said, strict=True) if text}


def _red(operation: Operation) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *operation.tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout[-3000:] + done.stderr[-3000:] + " " if done.returncode else ""


class Worker:
    """A process that measures one variant; started when it is asked, and again after it has died."""

    def __init__(self, root: Path, threads: int) -> None:
        self.root = root
        self.threads = threads
        self.process: subprocess.Popen[str] | None = None
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the worker

    def ask(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        """The answer; one with "failed" where the process died or took too long."""
        process = self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(patience, process.kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it is dead; why is in its last words
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                if line.startswith(PREFIX):
                    return dict(json.loads(line.removeprefix(PREFIX)))
        finally:
            timer.cancel()
        return {"failed": self._last_words(patience)}

    def start(self) -> "subprocess.Popen[str]":
        """The process, started where there is none."""
        if self.process is None:
            self.process = self._started()
        return self.process

    def _started(self) -> "subprocess.Popen[str]":
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TRITON_INTERPRET": "0"}
        return subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            cwd=self.root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )

    def _last_words(self, patience: float) -> str:
        assert self.process is not None
        code = self.process.wait()
        self.close()
        self.said.seek(0)
        lines = [line.strip() for line in self.said.read().splitlines() if line.strip()]
        self.said.seek(0)
        self.said.truncate()
        if code == -9:
            return f"no answer in {patience:.0f} s, or out of memory"
        errors = [line for line in lines if "Error" in line.split(":")[0]]
        return (errors or lines or [f"exit code {code}"])[-1][:300]

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()
            self.process = None


class Suite:
    """A run, case by case; a context, because processes that measure on a GPU stay until its end."""

    def __init__(self, settings: Settings, advance: Callable[[str], None] = lambda _: None) -> None:
        self.settings = settings
        self.advance = advance
        self.facts = this_machine()
        self.about = about_run(settings.threads, settings.repetitions)
        self.rates: dict[str, Row] = {}
        self.workers: dict[str, Worker] = {}

    def __enter__(self) -> "Suite":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def planned(self, cases: Sequence[Case]) -> int:
        """How many measurements the cases take."""
        return self.settings.repetitions * sum(len(self._variants(case)[0]) for case in cases)

    def start(self, cases: Sequence[Case]) -> None:
        """Let the processes for these cases load their libraries, while something else is done."""
        for case in cases:
            for variant in self._variants(case)[0]:
                self._worker(variant).start()

    def run(self, cases: Sequence[Case], until: float = math.inf) -> Iterator[Outcome]:
        """Measure cases of one operation.

        Args:
            cases: In the order of their weight.
            until: By `time.monotonic()`: no case is begun later, and every case that is left out says so.
        """
        found: dict[int, Answers] = {number: {} for number in range(len(cases))}
        outcomes = [Outcome(case, skipped=self._variants(case)[1]) for case in cases]
        for repetition, number in self._order(len(cases)):
            late = not found[number] and time.monotonic() > until
            self._repeat(cases[number], repetition, found[number], outcomes[number], late)
            if self.facts.device == "cpu" and number == len(cases) - 1:
                self._close()  # each repetition in new processes
        for number, outcome in enumerate(outcomes):
            for variant in self._variants(outcome.case)[0]:
                if variant.name not in outcome.skipped:
                    rates, answers = self._rates(outcome.case.dtype), found[number][variant.name]
                    outcome.rows.append(row_of(self.about, outcome.case, variant, answers, rates))
            yield outcome

    def _order(self, cases: int) -> list[tuple[int, int]]:
        """(repetition, case): a case after the other on a GPU, a repetition after the other on a CPU."""
        if self.facts.device == "cpu":
            return [(repetition, case) for repetition in range(self.settings.repetitions) for case in range(cases)]
        return [(repetition, case) for case in range(cases) for repetition in range(self.settings.repetitions)]

    def _variants(self, case: Case) -> tuple[list[Variant], dict[str, str]]:
        variants, refused = take_part(case, self.facts, self.settings.peers)
        return [*variants[:-1], *self.settings.others, variants[-1]], refused

    def _worker(self, variant: Variant) -> Worker:
        if variant.name not in self.workers:
            self.workers[variant.name] = Worker(variant.root, self.settings.threads)
        return self.workers[variant.name]

    def _repeat(self, case: Case, repetition: int, answers: Answers, outcome: Outcome, late: bool) -> None:
        variants = self._variants(case)[0]
        share = self.settings.seconds / len(variants) / self.settings.repetitions
        for variant in variants if repetition % 2 == 0 else reversed(variants):
            self.advance(f"{case.operation} {case.label}: {variant.name}")
            if variant.name in outcome.skipped:
                continue
            if late:
                outcome.skipped[variant.name] = f"no time was left for {case.label}"
                continue
            options = {**case.options, **({"implementation": variant.implementation} if variant.named else {})}
            request = {"case": {**asdict(case), "options": options}, "peer": variant.peer.name, "seconds": share}
            answer = self._worker(variant).ask({**request, "memory": repetition == 0}, PATIENCE + 10 * share)
            if "seconds" in answer:
                answers.setdefault(variant.name, []).append(answer)
                continue
            outcome.skipped[variant.name] = answer.get("refused") or f"failed: {answer['failed']}"
            if variant.name == OURS:
                outcome.broken.append(variant.name)

    def _rates(self, dtype: str) -> Row:
        if dtype not in self.rates:
            worker = Worker(ROOT, self.settings.threads)
            answer = worker.ask({"rates": dtype}, PATIENCE)
            worker.close()
            if "failed" in answer:
                raise RuntimeError(f"the device's own rates cannot be measured: {answer['failed']}")
            self.rates[dtype] = answer
        return self.rates[dtype]

    def _close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()
