"""Which implementation of `attention` is fastest for a kind of call: timed once per process, forward and backward.

The stand-in has one key head and one row of the batch: what decides is the length, the widths and who sees whom. It runs on
the call's device and draws no random numbers.
"""

import functools
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

SHORTEST, LONGEST = 128, 2048  # lengths are rounded up to a power of 2 in between
DOCUMENTS = 8
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Kind:
    """Calls that are alike in what decides their time.

    Attributes:
        device, dtype: Of the tensors.
        groups: Query heads per key head.
        widths: (D, E).
        length: Of the stand-in.
        causal: Whether it is causal.
        features: As the kernel names them.
    """

    device: torch.device
    dtype: torch.dtype
    groups: int
    widths: tuple[int, int]
    length: int
    causal: bool
    features: frozenset[str]


def bucket(length: int) -> int:
    """The length at which calls of this length are timed."""
    return int(min(max(1 << max(length - 1, 0).bit_length(), SHORTEST), LONGEST))


@functools.cache
def fastest(kind: Kind, names: tuple[str, ...]) -> str:
    """The fastest of these implementations for this kind of call; the first, unless another one is faster by a twentieth in each
    round but one: what else the machine does may slow any round down, and must not decide."""
    hidden = saved_tensors_hooks(_itself, _itself)  # from a checkpoint around the call, which would run this again
    with hidden, torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind.device.type, enabled=False):
        times = timings(kind, names)
    best = min(times, key=lambda name: times[name][0])
    return best if times[best][-2] * 1.05 < times[names[0]][0] else names[0]


def timings(kind: Kind, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Name -> seconds of a forward and backward in each round, sorted; the rounds of all are interleaved."""
    steps = {name: _step(kind, name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            _finish(kind.device)
            began = time.perf_counter()
            step()
            _finish(kind.device)
            seconds[name].append(time.perf_counter() - began)
    return {name: sorted(rounds) for name, rounds in seconds.items()}


def _step(kind: Kind, name: str) -> Callable[[], None]:
    attention = importlib.import_module("automodel_accel.kernels.attention").attention
    width, value_width = kind.widths

    def leaf(heads: int, size: int) -> torch.Tensor:
        values = torch.linspace(-1, 1, heads * kind.length * size, dtype=torch.float32).sin()
        shape = (1, kind.length, heads, size)
        return values.view(shape).to(kind.device, kind.dtype).transpose(1, 2).requires_grad_()

    leaves = [leaf(kind.groups, width), leaf(1, width), leaf(1, value_width)]
    options = _options(kind)

    def step() -> None:
        output = attention(*leaves, causal=kind.causal, implementation=name, **options)
        torch.autograd.grad(output, leaves, output.detach())

    return step


def _options(kind: Kind) -> dict[str, Any]:
    tokens = torch.arange(kind.length, device=kind.device)
    options: dict[str, dict[str, Any]] = {
        "windows": {"window": max(kind.length // 4, 1)},
        "soft-caps": {"softcap": 30.0},
        "sinks": {"sinks": torch.zeros(kind.groups, dtype=kind.dtype, device=kind.device)},
        "documents": {"documents": (tokens * DOCUMENTS // kind.length)[None]},
        "masks": {"mask": torch.where(tokens[:, None] >= tokens, 0.0, -1e9).to(kind.dtype)[None, None]},
        "bool masks": {"mask": (tokens[:, None] >= tokens)[None, None]},
        "dropout": {"dropout_p": 0.1},
    }
    return {name: value for feature in kind.features for name, value in options.get(feature, {}).items()}


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
