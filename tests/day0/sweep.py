"""Every architecture that transformers ships, through every check: `python -m tests.day0`."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

import automodel_accel as accel
from automodel_accel.patches.probe import PROBE_ERRORS
from tests.day0.checks import CHECKS, Case, NotApplicable, case_of, served
from tests.day0.zoo import Type, Unbuildable, types

FUSIONS = ("norm", "mlp", "experts", "rope", "attention", "residual", "linear", "loss")
TOGETHER = "all together"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found for one architecture.

    Attributes:
        name, kind: The type.
        unbuildable: Why no tiny instance could be built or trained; the rest is empty then.
        image: Whether its batch had an image.
        calls: Fusion -> calls of its kernel in one training step.
        materialised: How often logits were built in that step.
        refused: What `apply` refused, as "fusion: reason", each once.
        wrong: Check -> what differs from vanilla. Empty is the promise.
        not_applicable: Check -> why vanilla cannot do it.
    """

    name: str
    kind: str
    unbuildable: str | None
    image: bool
    calls: dict[str, int]
    materialised: int
    refused: list[str]
    wrong: dict[str, str]
    not_applicable: dict[str, str]

    def has(self, fusion: str) -> bool:
        """Whether the fusion served at least one call, and for the loss, whether no logits were built."""
        if fusion == TOGETHER:
            mixer = self.has("mlp") or self.has("experts")
            return mixer and all(self.has(name) for name in ("norm", "rope", "attention", "loss"))
        return self.calls.get(fusion, 0) > 0 and not (fusion == "loss" and self.materialised)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def sweep(
    kinds: Sequence[str], checks: Sequence[str], names: Sequence[str] = (), processes: int = 2
) -> Iterator[Outcome]:
    """Outcomes as they come, in no order; `names` limits the types."""
    chosen = [type for kind in kinds for type in types(kind) if not names or type.name in names]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(_examine, chosen, [tuple(checks)] * len(chosen))


def _examine(type: Type, checks: Sequence[str]) -> Outcome:
    found = Outcome(type.name, type.kind, None, False, {}, 0, [], {}, {})
    try:
        case = case_of(type)
        case.vanilla_step  # noqa: B018  # a model that vanilla cannot train is none of the zoo
    except (Unbuildable, *PROBE_ERRORS) as error:
        return Outcome(type.name, type.kind, f"{error}", False, {}, 0, [], {}, {})
    for name in checks:
        try:
            CHECKS[name](case)
        except NotApplicable as reason:
            found.not_applicable[name] = str(reason)
        except (AssertionError, *PROBE_ERRORS) as error:
            if case.is_repeatable:
                found.wrong[name] = f"{error.__class__.__name__}: {error}"[:400]
            else:
                found.not_applicable[name] = "vanilla draws a seed of its own, and gives another loss each time"
    return _with_counts(found, case)


def _with_counts(found: Outcome, case: Case) -> Outcome:
    try:
        calls, materialised = served(case)
        refusals = accel.report(case.ours).refusals
    except PROBE_ERRORS as error:
        found.wrong.setdefault("parity", f"{error.__class__.__name__}: {error}"[:400])
        return found
    refused = sorted({f"{fusion}: {no.reason}" for fusion, no in refusals})
    plain = {fusion: calls[fusion] for fusion in FUSIONS if calls[fusion]}
    return Outcome(
        *(found.name, found.kind, None, bool(case.tiny.has_image), plain, materialised, refused),
        *(found.wrong, found.not_applicable),
    )
