"""What a patch is: it matches a place in a model, says how to prove the swap, and swaps it.

A `Patch` never changes the model while it matches. It returns a `Claim` (with the structure it recognised) or a `Refusal`;
the plan collects all of them on the untouched model. An `Experiment` lets the prover run ours beside the original. `swap`
re-types instances (see retype.py), so that undoing needs no memory of its own.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from automodel_accel.kernels.contract import AUTO, Choice, Kernel, Refusal, Spec, choose
from automodel_accel.kernels.facts import Facts
from automodel_accel.kernels.fp8_linear.history import Histories
from automodel_accel.kernels.fp8_linear.noted import Wish, noted
from automodel_accel.kernels.room import left

# (device type, dtype of the activations, ...): what a swapped forward looks up before it takes the fused path
CallKey = tuple[Any, ...]
Proven = Mapping[CallKey, str]


@dataclass(frozen=True, slots=True)
class Context:
    """What a patch may know while it matches: the machine, the devices to serve, and what the user asked for.

    Attributes:
        facts: The machine.
        devices: Device types to serve.
        wanted: "auto", or the implementation that the user named.
        recompute: What is computed again in backward: "selective", "mlp", "full", or None.
        taken: Dotted names of the modules that an earlier patch computes.
        fp8: "auto", or the name of how values are rounded to 8 bits, or None.
        fp8_layers: Patterns of the dotted names of linears, one of which a linear must have for FP8; none: any has.
    """

    facts: Facts
    devices: tuple[str, ...]
    wanted: str
    recompute: str | None = None
    taken: frozenset[str] = frozenset()
    fp8: str | None = None
    fp8_layers: tuple[str, ...] = ()

    def choices(
        self, kernel: Kernel, dtype: torch.dtype, size: int, features: frozenset[str] = frozenset()
    ) -> dict[str, Choice]:
        """One choice per device; a refused explicit request falls back to "auto" and keeps the refusal."""
        return {device: self._choice(kernel, Spec(device, dtype, size, features)) for device in self.devices}

    def _choice(self, kernel: Kernel, spec: Spec) -> Choice:
        if self.wanted == AUTO or self.wanted in kernel.names():
            choice = choose(kernel, self.facts, spec, self.wanted)
            if choice.winner is not None or self.wanted == AUTO:
                return choice
            refused = choice.refused
        else:  # a fusion serves several operations, and not all of them are implemented there
            refused = (Refusal(f"{kernel.name}: {self.wanted}", f"does not implement {kernel.name}"),)
        fallback = choose(kernel, self.facts, spec)
        return replace(fallback, refused=refused + fallback.refused)


@dataclass(frozen=True, slots=True)
class Claim:
    """One place in a model that a patch can serve.

    Attributes:
        fusion: Name of the patch: "norm", "mlp", "loss"...
        paths: Dotted names of the modules that are re-typed.
        label: What was recognised, for people; places with an equal label share a row of the plan.
        dtype: Dtype of the place's parameters, in which it is proved.
        form: The recognised structure; with `dtype` the key under which places share one proof.
        choices: Device type -> chosen implementation and refusals.
        part: What of these modules is taken; two claims on one part of a module are an error.
        taken: Dotted names of the modules that no later patch may compute, where it is not the forward that is taken.
    """

    fusion: str
    paths: tuple[str, ...]
    label: str
    dtype: torch.dtype
    form: Hashable
    choices: Mapping[str, Choice] = field(hash=False)
    part: str = "forward"
    taken: tuple[str, ...] = ()

    @property
    def proof_key(self) -> Hashable:
        """Places with the same key are proved once."""
        return self.fusion, self.form, self.dtype


@dataclass(frozen=True, slots=True)
class Experiment:
    """The original, ours and the truth on the same inputs.

    Attributes:
        inputs: Name -> float64 tensor; each becomes a leaf in the dtype under test.
        dtypes: Name -> dtype under test.
        theirs: The original, from the leaves.
        ours: The swapped place, from the leaves.
        truth: The definition in float64, from the same leaves in float64.
        autocast: Dtype of an autocast region around ours and theirs, or None.
    """

    inputs: Mapping[str, torch.Tensor]
    dtypes: Mapping[str, torch.dtype]
    theirs: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    ours: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    truth: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    autocast: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Beside:
    """What linears ask of the producer of their input.

    Attributes:
        columns: Room beside each row, for adapters (kernels/room.py).
        wish: What to note of it for a cast to 8 bits (kernels/fp8_linear/noted.py), or None.
    """

    columns: int = 0
    wish: Wish | None = None

    def made_by(self, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """`function(*inputs, **options)`, with that beside its output, the first one where there are several."""
        return left(self.columns, noted, self.wish, function, *inputs, **options)


NOTHING = Beside()


@dataclass(slots=True)
class Counts:
    """What happened at run time, outside of compiled graphs.

    Attributes:
        fused: Calls served by a kernel, by fusion.
        passed_on: Calls handed to the original forward, by reason.
        materialised: Times that real logits were built in a training step with labels, by the operation that asked.
        report: The report that shows them; every swapped class leads back to it.
        rooms: Width of an input of adapted linears -> columns to leave beside it.
        histories: Of FP8 linears with delayed scaling, which know on the device how many values saturated.
        wishes: Width of an input of FP8 linears -> what to note of it.
    """

    fused: Counter[str] = field(default_factory=Counter)
    passed_on: Counter[str] = field(default_factory=Counter)
    materialised: Counter[str] = field(default_factory=Counter)
    report: object = None
    rooms: dict[int, int] = field(default_factory=dict)
    wishes: dict[int, Wish] = field(default_factory=dict)
    histories: list[Histories] = field(default_factory=list)

    @property
    def saturated(self) -> int:
        """Values past the range of their delayed scale; waits for the device."""
        return sum(histories.saturated() for histories in self.histories)

    def beside(self, size: int) -> Beside:
        """What is asked of an output of that width: nothing where nothing trains, or in a graph of torch.compile."""
        asked = self.rooms or self.wishes
        if not asked or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return NOTHING
        return Beside(self.rooms.get(size, 0), self.wishes.get(size))

    def count(self, counter: Counter[str], name: str) -> None:
        """Count, unless torch.compile is tracing: a Python counter in a graph would force recompiles."""
        if not torch.compiler.is_compiling():
            counter[name] += 1


class Patch(Protocol):
    """Finds a place, shows how to prove it, swaps it."""

    fusion: str
    kernel: Kernel

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """A claim, a reasoned refusal, or None where this is no place for the patch. Changes nothing."""

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """The calls to prove on that device, the place's native one first."""

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """How to prove one call."""

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the modules at `claim.paths`; only proven calls take the fused path."""
