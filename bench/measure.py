"""Time one operation and count its memory, in this process, on whatever device it has."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from bench.case import Forward, Inputs, as_tuple, backward, forward_and_backward, leaves

WARMUP = 3
GPU_ITERATIONS = 5, 200  # at least and at most
CPU_ITERATIONS = 1, 50
FLUSHED_BYTES = 64 * 2**20  # at least, and twice the cache of the device


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one process measured.

    Attributes:
        seconds: Of each iteration, forward and backward; on a GPU, between events on its stream.
        forward_seconds: The part of it before the backward.
        cpu_seconds: Processor time of each iteration, all threads together; less noisy on a shared machine.
        host_seconds: Until both are queued; on a CPU, which queues nothing, the same as `seconds`.
        extra_peak_bytes: Peak of torch's allocations over the inputs; None where it was not asked for.
    """

    seconds: list[float]
    forward_seconds: list[float]
    cpu_seconds: list[float]
    host_seconds: list[float]
    extra_peak_bytes: int | None


def measure(forward: Forward, inputs: Inputs, seconds: float, memory: bool, compiles: bool) -> Measurement:
    """Run an operation forward and backward, again and again.

    Args:
        forward: The operation.
        inputs: Of a case.
        seconds: Time to spend, about; at least once on a CPU, and a few times on a GPU.
        memory: Whether to count memory too, in a call of its own.
        compiles: Whether the first call at these sizes compiles or builds, so that it must not be measured.
    """
    if inputs["grads"][0].is_cuda:
        return _on_gpu(forward, inputs, seconds)
    if compiles:
        _run(forward, inputs)
    peak = _peak_on_cpu(forward, inputs) if memory else None
    return _on_cpu(forward, inputs, seconds, peak)


def _forget_gradients(inputs: Inputs) -> None:
    for tensor in leaves(inputs).values():
        tensor.grad = None


def _run(forward: Forward, inputs: Inputs) -> None:
    _forget_gradients(inputs)
    forward_and_backward(forward, inputs)


def _peak_on_cpu(forward: Forward, inputs: Inputs) -> int:
    """What torch's allocator hands out, followed event by event: the process keeps memory that torch has given back."""
    _forget_gradients(inputs)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        _run(forward, inputs)
    events = watched.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def _on_cpu(forward: Forward, inputs: Inputs, seconds: float, peak: int | None) -> Measurement:
    least, most = CPU_ITERATIONS
    found = Measurement([], [], [], [], peak)
    while len(found.seconds) < least or (len(found.seconds) < most and sum(found.seconds) < seconds):
        _forget_gradients(inputs)
        cpu, start = time.process_time(), time.perf_counter()
        outputs = as_tuple(forward(inputs))
        middle = time.perf_counter()
        backward(outputs, inputs["grads"])
        end = time.perf_counter()
        found.seconds.append(end - start)
        found.forward_seconds.append(middle - start)
        found.cpu_seconds.append(time.process_time() - cpu)
        found.host_seconds.append(end - start)
        del outputs
    if len(found.seconds) > least:  # the first one also finds its memory
        for values in (found.seconds, found.forward_seconds, found.cpu_seconds, found.host_seconds):
            del values[0]
    return found


def _on_gpu(forward: Forward, inputs: Inputs, seconds: float) -> Measurement:
    for _ in range(WARMUP):
        _run(forward, inputs)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(WARMUP):
        _run(forward, inputs)
    torch.cuda.synchronize()
    one = (time.perf_counter() - start) / WARMUP
    least, most = GPU_ITERATIONS
    iterations = min(max(least, round(seconds / one)), most)
    peak = _peak_on_gpu(forward, inputs)
    return _timed_on_gpu(forward, inputs, iterations, peak)


def _peak_on_gpu(forward: Forward, inputs: Inputs) -> int:
    _forget_gradients(inputs)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _run(forward, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _timed_on_gpu(forward: Forward, inputs: Inputs, iterations: int, peak: int) -> Measurement:
    """Nothing waits for the GPU between iterations, so that it is the GPU that is timed, where the host keeps up."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    flush = torch.empty(max(2 * cache, FLUSHED_BYTES), dtype=torch.uint8, device="cuda")
    found = Measurement([], [], [], [], peak)
    events = []
    for _ in range(iterations):
        _forget_gradients(inputs)
        grads = tuple(grad.clone() for grad in inputs["grads"])  # some peers write over them
        flush.zero_()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
        cpu, host = time.process_time(), time.perf_counter()
        marks[0].record()
        outputs = as_tuple(forward(inputs))
        marks[1].record()
        backward(outputs, grads)
        marks[2].record()
        found.host_seconds.append(time.perf_counter() - host)
        found.cpu_seconds.append(time.process_time() - cpu)
        events.append(marks)
        del outputs
    torch.cuda.synchronize()
    found.seconds.extend(start.elapsed_time(end) / 1000 for start, _, end in events)
    found.forward_seconds.extend(start.elapsed_time(middle) / 1000 for start, middle, _ in events)
    return found


def copy_bytes_per_second(device: str) -> float:
    """What a copy moves, read and written, on this device: the most that an operation bound by memory can reach."""
    source = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    return 2 * source.numel() / _fastest(lambda: target.copy_(source), device)


def matmul_flops_per_second(device: str, dtype: torch.dtype) -> float:
    """What a large square product of matrices reaches on this device."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _fastest(lambda: a @ b, device)


def _fastest(run: Callable[[], object], device: str) -> float:
    found = []
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)
