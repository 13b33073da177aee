"""What the steps of a training run take: marks on the host's clock or on a GPU's stream, and what the batches hold."""

import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from automodel_accel.flops import TrainingFlops, attended_pairs, rows_and_width, training_flops, vendor_peak
from automodel_accel.kernels.facts import Facts
from automodel_accel.report import Report

IGNORED = -100  # a token that is no label
LINUX_STATUS = Path("/proc/self/status")


class _HostClock:
    """Marks are seconds."""

    def mark(self) -> float:
        return time.perf_counter()

    def is_past(self, mark: float) -> bool:
        return True

    def wait(self, mark: float) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start


class _CudaClock:
    """Marks are events on the current stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def is_past(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())  # type: ignore[no-untyped-call]

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1000


@dataclass(slots=True)
class _Step:
    """One optimizer step: four marks, and what its batches hold (tensors on a GPU, for which nobody waits)."""

    begun: Any
    received: Any = None
    updating: Any = None
    ended: Any = None
    tokens: Any = 0
    labels: Any = 0
    pairs: dict[int | None, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Total:
    """Of the steps since the last log."""

    steps: int = 0
    data: float = 0.0
    forward_backward: float = 0.0
    optimizer: float = 0.0
    tokens: Any = 0
    labels: Any = 0
    pairs: dict[int | None, Any] = field(default_factory=dict)


class Meter:
    """Measures the steps of one training run, by this process.

    Args:
        model: As it trains.
        report: What `apply` did to it; None where nothing was applied.
        facts: The machine, whose peak is what MFU is a share of.
        on_cuda: Whether steps run on a stream, and the host does not wait for them.
        devices: How many share what this process counts.
        dtype: In which the matrix products run: "bfloat16", "float32".
    """

    def __init__(
        self, model: nn.Module, report: Report | None, facts: Facts, *, on_cuda: bool, devices: int, dtype: str
    ) -> None:
        self._on_cuda, self._devices = on_cuda, devices
        self._clock: Any = _CudaClock() if on_cuda else _HostClock()
        self._peak = vendor_peak(facts.device_name, dtype)
        self._flops: TrainingFlops | None = training_flops(model) if self._peak is not None else None
        # a loss that was not swapped always builds them, and nobody counts
        self._counts = report.counts if report is not None and report.places("loss") else None
        self._logits_before = self._logits()
        self._step: _Step | None = None
        self._open: deque[_Step] = deque()
        self._total = _Total()

    def begin(self) -> None:
        """The step begins: its batches are asked for."""
        self._step = _Step(self._clock.mark())

    def receive(self, batches: list[Any]) -> None:
        """The batches are there; their tokens are counted."""
        step = self._step
        assert step is not None
        for batch in batches:
            if isinstance(batch, Mapping):
                self._count(step, batch)
        step.received = self._clock.mark()

    def update(self) -> None:
        """Forward and backward are done."""
        if self._step is not None:
            self._step.updating = self._clock.mark()

    def end(self) -> None:
        """The step is done. Adds up the steps that the device has finished, and waits for none."""
        step, self._step = self._step, None
        if step is None:
            return
        step.ended = self._clock.mark()
        step.updating = step.updating or step.ended
        self._open.append(step)
        while self._open and self._clock.is_past(self._open[0].ended):
            self._add(self._open.popleft())

    def figures(self) -> dict[str, float | int]:
        """Of the steps since the last call; empty where there was none."""
        while self._open:
            self._clock.wait(self._open[0].ended)
            self._add(self._open.popleft())
        total, self._total = self._total, _Total()
        if not total.steps:
            return {}
        seconds = total.data + total.forward_backward + total.optimizer
        found: dict[str, float | int] = {}
        if tokens := int(total.tokens):
            found["tokens_per_second_per_device"] = tokens / seconds / self._devices
            if labels := int(total.labels):
                found["label_tokens_per_second_per_device"] = labels / seconds / self._devices
            if self._flops is not None and self._peak is not None:
                flops = self._flops.total(tokens, {window: int(pairs) for window, pairs in total.pairs.items()})
                found["mfu"] = flops / seconds / self._devices / self._peak
        found["peak_memory_gb"] = _peak_memory(self._on_cuda) / 1e9
        if self._counts is not None:
            logits = self._logits()
            found["materialised_logits"] = logits - self._logits_before
            self._logits_before = logits
        found["seconds_data"] = total.data / total.steps
        found["seconds_forward_backward"] = total.forward_backward / total.steps
        found["seconds_optimizer"] = total.optimizer / total.steps
        return found

    def _logits(self) -> int:
        return self._counts.materialised.total() if self._counts is not None else 0

    def _count(self, step: _Step, batch: Mapping[str, Any]) -> None:
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            step.tokens += _number(mask.sum())
        else:
            rows, width = rows_and_width(batch)
            step.tokens += rows * width
        if isinstance(labels, torch.Tensor):
            step.labels += _number((labels != IGNORED).count_nonzero())
        for window in self._flops.per_pair if self._flops is not None else ():
            step.pairs[window] = step.pairs.get(window, 0) + _number(attended_pairs(batch, window))

    def _add(self, step: _Step) -> None:
        total, seconds = self._total, self._clock.seconds
        total.steps += 1
        total.data += seconds(step.begun, step.received)
        total.forward_backward += seconds(step.received, step.updating)
        total.optimizer += seconds(step.updating, step.ended)
        total.tokens += step.tokens
        total.labels += step.labels
        for window, pairs in step.pairs.items():
            total.pairs[window] = total.pairs.get(window, 0) + pairs


def _number(count: torch.Tensor | int) -> torch.Tensor | int:
    """A number, unless it would have to be waited for."""
    return int(count) if isinstance(count, int) or count.device.type == "cpu" else count


def _peak_memory(on_cuda: bool) -> int:
    """In bytes, since the process began. Never reset: the Trainer's own memory metrics read the same counter."""
    if on_cuda:
        return torch.cuda.max_memory_allocated()
    if LINUX_STATUS.exists():  # getrusage would count in the parent process
        return int(LINUX_STATUS.read_bytes().partition(b"VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
