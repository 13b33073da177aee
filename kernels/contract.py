"""The contract between an operation, its implementations, and whoever asks for one.

A `Kernel` is a named operation: a plain PyTorch reference that defines it, and implementations that must equal it.
`choose` picks one implementation for a `Spec` on a machine (`Facts`), and returns the reason against every other one.
An implementation is a module with two functions, `forward` and `backward`, imported only when it is used. The host code of
an operation (shapes, dtypes, autograd, registration) stands once, in the operation's `__init__.py`.
"""

import difflib
import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from automodel_accel.kernels.facts import Facts, this_machine

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A "no", with its reason (and the number that caused it) and what to do about it.

    Attributes:
        what: What was refused: an implementation, a place in a model, or a request.
        reason: Why, with what came and what was expected.
        remedy: What stays in force or what to do; may be empty.
    """

    what: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True, slots=True)
class Spec:
    """What one place asks of a kernel.

    Attributes:
        device: Torch device type of the tensors, such as "cuda".
        dtype: Dtype of the activations.
        size: Length of the row that the kernel works on (hidden size, intermediate size or vocabulary).
        features: What this call asks for beyond the plain operation, in the kernel's own words.
    """

    device: str
    dtype: torch.dtype
    size: int
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One way to compute a kernel.

    Attributes:
        name: "torch", "triton", ...
        module: Dotted name of the module with its `forward` and `backward`.
        devices: Device types on which "auto" may take it.
        dtypes: Activation dtypes it computes.
        max_size: Longest row it takes; None for any.
        needs: Distribution name of a package that it needs, if any.
        features: What it can do beyond the plain operation, in the kernel's own words.
    """

    name: str
    module: str
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    max_size: int | None = None
    needs: str | None = None
    features: frozenset[str] = frozenset()

    def objection(self, facts: Facts, spec: Spec) -> str | None:
        """The reason why this implementation cannot serve the spec on that machine, or None."""
        if self.needs is not None and not facts.has(self.needs):
            return f"the package {self.needs} is not installed"
        interpreted = self.needs == "triton" and facts.triton_interpreter and spec.device == "cpu"
        if spec.device not in self.devices and not interpreted:
            return f"runs on {_listed(self.devices)}; the tensors are on {spec.device}"
        if spec.dtype not in self.dtypes:
            return f"computes {_listed(map(str, self.dtypes))}; the tensors are {spec.dtype}"
        if self.max_size is not None and spec.size > self.max_size:
            return f"takes rows of at most {self.max_size} elements; these have {spec.size}"
        if missing := spec.features - self.features:
            return f"does not do {_listed(missing)}"
        return None


def in_triton(module: str, max_size: int | None = None) -> Implementation:
    """An implementation by Triton kernels, on any GPU."""
    return Implementation(
        name="triton",
        module=module,
        devices=frozenset({"cuda", "xpu"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        max_size=max_size,
        needs="triton",
    )


def in_torch(module: str) -> Implementation:
    """An implementation by torch operations, on any device."""
    return Implementation(
        name="torch",
        module=module,
        devices=frozenset({"cuda", "xpu", "cpu", "mps"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64}),
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation that won (None when a named one was refused), and the reason against every other one."""

    kernel: str
    winner: Implementation | None
    refused: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: it is a cache key on the hot path
class Kernel:
    """A named operation.

    Attributes:
        name: Such as "rms_norm".
        reference: The definition, in plain differentiable PyTorch.
        implementations: Best first.
    """

    name: str
    reference: Callable[..., torch.Tensor]
    implementations: tuple[Implementation, ...]

    def names(self) -> list[str]:
        """The names that a user may ask for, beside "auto"."""
        return [implementation.name for implementation in self.implementations]


def choose(kernel: Kernel, facts: Facts, spec: Spec, wanted: str = AUTO) -> Choice:
    """Pick an implementation of `kernel` for `spec` on the machine `facts`.

    Args:
        kernel: The operation.
        facts: The machine.
        spec: What is asked.
        wanted: "auto" for the best one that can serve, or one implementation's name.

    Returns:
        The winner, and a refusal for each implementation that was passed over.

    Raises:
        ValueError: `wanted` names no implementation of this kernel.
    """
    if wanted != AUTO and wanted not in kernel.names():
        raise ValueError(unknown_name(f"implementation of {kernel.name}", wanted, [AUTO, *kernel.names()]))
    refused: list[Refusal] = []
    for implementation in kernel.implementations:
        if wanted != AUTO and implementation.name != wanted:
            continue
        objection = implementation.objection(facts, spec)
        if objection is None and wanted == AUTO and spec.device not in implementation.devices:
            objection = "runs in Triton's interpreter here: right, but slow, so it must be named"
        if objection is None:
            return Choice(kernel.name, implementation, tuple(refused))
        refused.append(Refusal(f"{kernel.name}: {implementation.name}", objection))
    return Choice(kernel.name, None, tuple(refused))


@functools.cache
def implementation_module(kernel: Kernel, device: str, dtype: torch.dtype, size: int, wanted: str) -> Any:
    """The module (with `forward` and `backward`) that serves a call; chosen once per argument tuple.

    Raises:
        ValueError: No implementation serves the call; says why for each.
    """
    choice = choose(kernel, this_machine(), Spec(device, dtype, size), wanted)
    if choice.winner is None:
        raise ValueError("; ".join(map(str, choice.refused)) + f". Ask for implementation={AUTO!r} instead.")
    return importlib.import_module(choice.winner.module)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist: what came, the nearest right one, and all that exist."""
    known = list(known)
    by_lower_case = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    hint = f" Did you mean {by_lower_case[near[0]]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}."


def _listed(items: Iterable[str]) -> str:
    return " and ".join(sorted(items))


@functools.cache
def kernel_errors() -> tuple[type[Exception], ...]:
    """What a kernel may raise when it does not work on this machine: torch's errors, and Triton's where it is installed."""
    if not this_machine().has("triton"):
        return RuntimeError, ValueError, TypeError
    return RuntimeError, ValueError, TypeError, importlib.import_module("triton.errors").TritonError
