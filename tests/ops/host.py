"""Host time of one forward and backward of an operation, its kernels left out: `python -m tests.ops.host` prints it as JSON.

Run in a process of its own with TRITON_INTERPRET unset. Tensors are on the CPU and the launch of a Triton kernel does nothing, so
that what is left is Python, torch's dispatcher, autograd and the allocation of outputs. Each operation is called on its own
outputs, LAYERS times, before one backward, as the layers of a model are. For scale, the same is measured right before it for an
autograd function that does nothing but save its input and return one tensor each way: what slows down the machine slows down
both, so that the median of the ratios is steady where microseconds are not.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from automodel_accel.kernels import contract
from automodel_accel.kernels.activation import activation
from automodel_accel.kernels.gated_linear import gated_linear
from automodel_accel.kernels.qk_norm_rope import qk_norm_rope
from automodel_accel.kernels.rms_norm import add_rms_norm, rms_norm
from automodel_accel.kernels.rope import rope

REPEATS, LAYERS = 100, 20
Layer = Callable[..., tuple[torch.Tensor, ...]]
Tensors = tuple[torch.Tensor, ...]


class Nothing(torch.autograd.Function):
    """What no operation can do with less."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """One output, one saved tensor."""
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        """One gradient."""
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


def operations() -> Mapping[str, tuple[Layer, Tensors]]:
    """Each operation as a function whose outputs are its inputs again, and these, of a few rows."""
    rows = tuple(torch.zeros(8, 64, requires_grad=True) for _ in "xr")
    weight, head_weight = torch.ones(64, requires_grad=True), torch.ones(16, requires_grad=True)
    heads = tuple(torch.zeros(1, 8, n, 16, requires_grad=True).transpose(1, 2) for n in (4, 2))
    cos, sin = torch.zeros(2, 1, 8, 16)
    named = {"implementation": "triton"}
    return {
        "rms_norm": (lambda x: (rms_norm(x, weight, 1e-6, **named),), rows[:1]),
        "add_rms_norm": (lambda x, r: add_rms_norm(x, r, weight, 1e-6, **named), rows),
        "gated_linear": (lambda gate, up: (gated_linear(gate, up, **named), up), rows),
        "activation": (lambda x: (activation(x, "relu2", **named),), rows[:1]),
        "rope": (lambda q, k: rope(q, k, cos, sin, **named), heads),  # type: ignore[return-value]
        "qk_norm_rope": (
            lambda q, k: qk_norm_rope(q, k, head_weight, head_weight, cos, sin, 1e-6, **named),
            heads,
        ),
    }


def without_kernels() -> None:
    """Let a launch do nothing, and the CPU be a machine on which Triton may be named."""
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: None
    facts = dataclasses.replace(contract.this_machine(), triton_interpreter=True)
    contract.this_machine = lambda: facts  # type: ignore[assignment]


def seconds(layer: Layer, inputs: Tensors) -> float:
    """Of one forward and backward."""
    start = time.process_time()  # not what other processes take
    outputs = inputs
    for _ in range(LAYERS):
        outputs = layer(*outputs)
    torch.autograd.backward(outputs[0], torch.empty_like(outputs[0]))
    return (time.process_time() - start) / LAYERS


def measure(operation: tuple[Layer, Tensors]) -> dict[str, float]:
    """The fastest run in microseconds, and the median multiple of the run of nothing before it."""
    nothing = (lambda x: (Nothing.apply(x),), (torch.zeros(8, 64, requires_grad=True),))  # type: ignore[no-untyped-call]
    pairs = [(seconds(*nothing), seconds(*operation)) for _ in range(REPEATS)]
    return {
        "microseconds": round(1e6 * min(ours for _, ours in pairs), 1),
        "of_nothing": round(statistics.median(ours / scale for scale, ours in pairs), 2),
    }


def main() -> None:
    """One JSON object: operation -> what `measure` gives."""
    torch.set_num_threads(1)
    without_kernels()
    sys.stdout.write(json.dumps({name: measure(one) for name, one in operations().items()}) + "\n")


if __name__ == "__main__":
    main()
