"""Measure one variant of one case in this process, which does nothing else; used by `bench.compare` in a process of its own.

Reads a request as JSON from its argument, and writes the measurement as JSON.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from automodel_accel.kernels.facts import this_machine
from bench.case import Inputs
from bench.cases import CASES

LINUX_STATUS = Path("/proc/self/status")
GPU_WARMUP = 3
GPU_ITERATIONS = 20


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one process measured.

    Attributes:
        seconds: Wall time of each iteration; on a GPU, between events on its stream.
        cpu_seconds: Processor time of each iteration, all threads together; less noisy on a shared machine.
        extra_peak_bytes: Peak of the memory (of the process on a CPU, of torch's allocator on a GPU) less the inputs.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    extra_peak_bytes: int


def measure(case: str, variant: str, sizes: dict[str, int | float], dtype: str) -> Measurement:
    """Run a variant on fresh inputs: once on a CPU, after a tiny run that loads the libraries; several times on a GPU."""
    device = "cuda" if this_machine().device == "cuda" else "cpu"
    run, make = CASES[case].variants[variant], CASES[case].inputs
    run(make({name: min(size, 16) for name, size in sizes.items()}, getattr(torch, dtype), device))
    inputs = make(sizes, getattr(torch, dtype), device)
    return (_on_gpu if device == "cuda" else _on_cpu)(run, inputs)


def _on_cpu(run: Callable[[Inputs], None], inputs: Inputs) -> Measurement:
    _forget_peak_of_process()
    before = _peak_of_process()
    wall, cpu = time.perf_counter(), time.process_time()
    run(inputs)
    return Measurement([time.perf_counter() - wall], [time.process_time() - cpu], _peak_of_process() - before)


def _forget_peak_of_process() -> None:
    """Lower the recorded peak, which imports have raised, to what is in use; on Linux only."""
    if LINUX_STATUS.exists():
        LINUX_STATUS.with_name("clear_refs").write_text("5")


def _peak_of_process() -> int:
    if LINUX_STATUS.exists():
        lines = LINUX_STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _on_gpu(run: Callable[[Inputs], None], inputs: Inputs) -> Measurement:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds, cpu_seconds = [], []
    for iteration in range(GPU_WARMUP + GPU_ITERATIONS):
        for tensor in inputs.values():
            tensor.grad = None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        cpu = time.process_time()
        start.record()
        run(inputs)
        end.record()
        cpu = time.process_time() - cpu
        torch.cuda.synchronize()
        if iteration >= GPU_WARMUP:
            seconds.append(start.elapsed_time(end) / 1000)
            cpu_seconds.append(cpu)
    return Measurement(seconds, cpu_seconds, torch.cuda.max_memory_allocated() - before)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure(**json.loads(sys.argv[1])))) + "\n")
