"""The contract between an operation, its implementations, and whoever asks for one.

A `Kernel` is a named operation: a plain PyTorch reference that defines it, and implementations that must equal it.
`choose` picks one implementation for a `Spec` on a machine (`Facts`): the fastest by the measured table of preference.py, the
first in order where nothing was measured. It returns why, and the reason against every one that cannot serve.
An implementation is a module with two functions, `forward` and `backward`, imported only when it is used. The host code of
an operation (shapes, dtypes, autograd, registration) stands once, in the operation's `__init__.py`.
"""

import difflib
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from automodel_accel.kernels import preference
from automodel_accel.kernels.facts import Facts, this_machine

AUTO = "auto"
IN_TRITON = frozenset({"triton", "liger-kernel"})  # packages whose kernels run in Triton's interpreter too
PLAIN: frozenset[str] = frozenset()


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
        name: "triton", "torch", "te", "liger", ...
        module: Dotted name of the module with its `forward` and `backward`.
        devices: Device types on which "auto" may take it.
        dtypes: Activation dtypes it computes.
        max_size: Longest row it takes; None for any.
        needs: Distribution name of a package that it needs, if any.
        archs: How the names of the GPU architectures begin on which it runs; all where empty.
        features: What it can do beyond the plain operation, in the kernel's own words.
        lacks: What it cannot do, and why, where "does not do ..." would not say enough.
    """

    name: str
    module: str
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    max_size: int | None = None
    needs: str | None = None
    archs: tuple[str, ...] = ()
    features: frozenset[str] = PLAIN
    lacks: Mapping[str, str] = field(default_factory=dict, hash=False)

    def objection(self, facts: Facts, spec: Spec) -> str | None:
        """The reason why this implementation cannot serve the spec on that machine, or None."""
        if self.needs is not None and not facts.has(self.needs):
            return f"the package {self.needs} is not installed"
        interpreted = self.needs in IN_TRITON and facts.triton_interpreter and spec.device == "cpu"
        if spec.device not in self.devices and not interpreted:
            return f"runs on {_listed(self.devices)}; the tensors are on {spec.device}"
        if self.archs and not interpreted and not facts.arch.startswith(self.archs):
            return f"runs on {_listed(f'{arch}*' for arch in self.archs)}; this is {facts.arch}"
        if spec.dtype not in self.dtypes:
            return f"computes {_listed(map(str, self.dtypes))}; the tensors are {spec.dtype}"
        if self.max_size is not None and spec.size > self.max_size:
            return f"takes rows of at most {self.max_size} elements; these have {spec.size}"
        if missing := spec.features - self.features:
            said = [self.lacks[feature] for feature in sorted(missing) if feature in self.lacks]
            return " and ".join(said) if said else f"does not do {_listed(missing)}"
        return None


def in_triton(
    module: str, max_size: int | None = None, features: frozenset[str] = PLAIN, archs: tuple[str, ...] = ()
) -> Implementation:
    """An implementation by Triton kernels, on any GPU or on those of some architectures."""
    return Implementation(
        name="triton",
        module=module,
        devices=frozenset({"cuda", "xpu"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        max_size=max_size,
        needs="triton",
        archs=archs,
        features=features,
    )


def in_torch(module: str, features: frozenset[str] = PLAIN) -> Implementation:
    """An implementation by torch operations, on any device."""
    return Implementation(
        name="torch",
        module=module,
        devices=frozenset({"cuda", "xpu", "cpu", "mps"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64}),
        features=features,
    )


def in_liger(
    module: str,
    features: frozenset[str],
    lacks: Mapping[str, str],
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.bfloat16, torch.float16}),
) -> Implementation:
    """An implementation by Liger's Triton kernels, which hold a row in one block of at most 65536 elements."""
    return Implementation(
        name="liger",
        module=module,
        devices=frozenset({"cuda", "xpu"}),
        dtypes=dtypes,
        max_size=65536,
        needs="liger-kernel",
        features=features - lacks.keys(),
        lacks=lacks,
    )


def in_te(
    module: str,
    features: frozenset[str],
    lacks: Mapping[str, str],
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.bfloat16, torch.float16}),
    archs: tuple[str, ...] = ("sm_",),
) -> Implementation:
    """An implementation by the kernels of Transformer Engine."""
    return Implementation(
        name="te",
        module=module,
        devices=frozenset({"cuda"}),
        dtypes=dtypes,
        needs="transformer-engine",
        archs=archs,
        features=features - lacks.keys(),
        lacks=lacks,
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation that won, and why.

    Attributes:
        kernel: Name of the operation.
        winner: None where a named one was refused, or none can serve.
        refused: Each one that cannot serve, with the reason against it.
        why: The reason for the winner.
        others: Those that could serve as well, best first.
    """

    kernel: str
    winner: Implementation | None
    refused: tuple[Refusal, ...]
    why: str = ""
    others: tuple[Implementation, ...] = ()


class CannotServeError(ValueError):
    """No implementation serves a call; says why for each."""


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
        The winner, why it is, and a refusal for each implementation that cannot serve.

    Raises:
        ValueError: `wanted` names no implementation of this kernel.
    """
    if wanted != AUTO and wanted not in kernel.names():
        raise ValueError(unknown_name(f"implementation of {kernel.name}", wanted, [AUTO, *kernel.names()]))
    refused: list[Refusal] = []
    able: list[Implementation] = []
    for implementation in kernel.implementations:
        if wanted != AUTO and implementation.name != wanted:
            continue
        objection = implementation.objection(facts, spec)
        if objection is None and wanted == AUTO and spec.device not in implementation.devices:
            objection = "runs in Triton's interpreter here: right, but slow, so it must be named"
        if objection is None:
            able.append(implementation)
        else:
            refused.append(Refusal(f"{kernel.name}: {implementation.name}", objection))
    if not able:
        return Choice(kernel.name, None, tuple(refused))
    if wanted != AUTO:
        return Choice(kernel.name, able[0], tuple(refused), "named by you")
    names, why = preference.order(kernel.name, facts, spec.dtype, spec.size, spec.features, [one.name for one in able])
    first, *others = sorted(able, key=lambda implementation: names.index(implementation.name))
    return Choice(kernel.name, first, tuple(refused), why, tuple(others))


@functools.cache
def implementation_module(
    kernel: Kernel, device: str, dtype: torch.dtype, size: int, wanted: str, features: frozenset[str] = PLAIN
) -> Any:
    """The module (with `forward` and `backward`) that serves a call; chosen once per argument tuple.

    Raises:
        CannotServeError: No implementation serves the call; says why for each.
    """
    choice = choose(kernel, this_machine(), Spec(device, dtype, size, features), wanted)
    if choice.winner is None:
        raise CannotServeError("; ".join(map(str, choice.refused)) + f". Ask for implementation={AUTO!r} instead.")
    return load(kernel, choice.winner)


def load(kernel: Kernel, implementation: Implementation) -> Any:
    """The module of an implementation.

    Raises:
        CannotServeError: the package that it needs is broken.
    """
    try:
        return importlib.import_module(implementation.module)
    except ImportError as error:
        what = f"{kernel.name}: {implementation.name}: {implementation.needs} is installed but cannot be imported"
        raise CannotServeError(f"{what} ({error}). Mend it, or name another implementation.") from error


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
    """What a kernel may raise when it does not work on this machine: torch's errors, and Triton's where it is installed.

    Packages of kernels check what they are given with assertions.
    """
    errors = RuntimeError, ValueError, TypeError, AssertionError
    if not this_machine().has("triton"):
        return errors
    return (*errors, importlib.import_module("triton.errors").TritonError)
