"""What a benchmark measures: an operation of a real model, at one size and in one dtype."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.models import Model

Sizes = Mapping[str, int | float]
Options = Mapping[str, Any]
# what a forward takes: tensors, some of which want gradients, options, and under "grads" the incoming gradients of its outputs
Inputs = dict[str, Any]
Outputs = torch.Tensor | tuple[torch.Tensor, ...]
Forward = Callable[[Inputs], Outputs]


class UnsupportedError(Exception):
    """A peer does not do what a case asks; says what."""


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the benchmark's list: everything that a process needs to make the inputs.

    Attributes:
        operation: Name of an operation.
        model: The real model whose sizes these are, or "custom".
        sizes: Tokens, widths, and so on.
        options: The operation's options, such as eps.
        dtype: Name of the dtype of the activations.
        cut: How the sizes were made smaller than the model's; empty where they were not.
    """

    operation: str
    model: str
    sizes: Sizes
    options: Options
    dtype: str
    cut: str = ""

    @property
    def label(self) -> str:
        """Model and tokens, and what sets this case apart from others of them."""
        found, sizes = f"{self.model}, {self.sizes['tokens']} tokens", self.sizes
        if sizes.get("ignored"):
            found += f", {sizes['ignored']:.0%} ignored"
        if "in_features" in sizes:
            widths = " + ".join(f"{size}" for name, size in sizes.items() if name.startswith("out_features"))
            found += f", {sizes['in_features']} to {widths}, weights {'train' if sizes['trains'] else 'frozen'}"
        if "rank" in sizes:
            found += f", adapters of rank {sizes['rank']}" if sizes["rank"] else ", no adapters"
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """An operation that is measured, forward and backward.

    Attributes:
        name: Of the operation.
        about: What it is, in one line.
        tests: Arguments for pytest: the tests that must be green before a speed is printed.
        models: Names of the models that have it.
        custom: Sizes of the case that the command line can change one by one.
        sizes: A model's sizes, without tokens.
        options: A model's options.
        inputs: (sizes, dtype, device) -> the inputs, made without temporary memory.
        flops: Floating-point operations that the sizes ask for, forward and backward.
        bytes_floor: (sizes, bytes of an element) -> the least bytes that must move between memory and processor.
        ignored: Shares of tokens without a label that the list has.
        cpu_cut: Sizes that are divided on a CPU, by how much.
        beside: Sizes in which a second case differs, which is measured beside each one.
        builds: Whether a peer's first call builds modules, so that it is not measured.
        parts: A model's sizes where it has the operation more than once; in place of `sizes`.
        wrong: The error, as a share of the largest true value, beyond which a peer computes something else; None: by the dtype.
    """

    name: str
    about: str
    tests: tuple[str, ...]
    models: tuple[str, ...]
    custom: Sizes
    sizes: Callable[[Model], Sizes]
    options: Callable[[Model], Options]
    inputs: Callable[[Sizes, torch.dtype, str], Inputs]
    flops: Callable[[Sizes], float]
    bytes_floor: Callable[[Sizes, int], float]
    ignored: tuple[float, ...] = (0.0,)
    cpu_cut: Mapping[str, int] = field(default_factory=dict)
    beside: Sizes = field(default_factory=dict)
    builds: bool = False
    parts: Callable[[Model], tuple[Sizes, ...]] | None = None
    wrong: float | None = None


def make_inputs(operation: Operation, sizes: Sizes, options: Options, dtype: torch.dtype, device: str) -> Inputs:
    """The inputs of a case: the tensors, and the options beside them."""
    return {**operation.inputs(sizes, dtype, device), **options}


def weights(inputs: Inputs) -> list[torch.nn.Parameter]:
    """Those of linears that share an input, in order."""
    return [value for name, value in inputs.items() if name.startswith("weight_")]


def leaves(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Those inputs that want a gradient."""
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.requires_grad}


def forward_and_backward(forward: Forward, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Run both, on the incoming gradients that the inputs hold; return the outputs."""
    outputs = as_tuple(forward(inputs))
    backward(outputs, inputs["grads"])
    return outputs


def backward(outputs: tuple[torch.Tensor, ...], grads: tuple[torch.Tensor, ...]) -> None:
    """Run the backward; a peer may return a loss in another dtype than eager torch, so gradients take the outputs'."""
    torch.autograd.backward(outputs, [grad.to(output.dtype) for output, grad in zip(outputs, grads, strict=True)])


def as_tuple(outputs: Outputs) -> tuple[torch.Tensor, ...]:
    """The outputs of an operation, one or many."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
