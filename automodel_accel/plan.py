"""The plan: all claims and refusals for one model, made on the untouched model."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from automodel_accel.config import AccelConfig
from automodel_accel.kernels.contract import AUTO, Refusal, unknown_name
from automodel_accel.kernels.facts import Facts
from automodel_accel.patches.checkpoint import no_layers
from automodel_accel.patches.contract import Claim, Context, Patch
from automodel_accel.tables import grouped_places, table


def all_patches() -> tuple[Patch, ...]:
    """Fresh patches: their caches of findings live as long as one plan."""
    # here, so that `import automodel_accel` registers no operation
    from automodel_accel.patches.attention import AttentionPatch
    from automodel_accel.patches.experts import ExpertsPatch
    from automodel_accel.patches.fp8 import Fp8Patch
    from automodel_accel.patches.linear import LinearPatch
    from automodel_accel.patches.loss import LossPatch
    from automodel_accel.patches.mlp import MlpPatch
    from automodel_accel.patches.norm import NormPatch
    from automodel_accel.patches.quantised import QuantisedPatch
    from automodel_accel.patches.residual import ResidualPatch
    from automodel_accel.patches.rope import RopePatch

    first = (NormPatch(), MlpPatch(), ExpertsPatch(), RopePatch(), AttentionPatch(), LossPatch(), ResidualPatch())
    return *first, Fp8Patch(), LinearPatch(), QuantisedPatch()


@dataclass(frozen=True, slots=True)
class Plan:
    """What `apply` would do to a model. `print` it; `to_json()` for machines.

    Attributes:
        model: Class name of the model.
        facts: The machine it was made for.
        config: What was asked.
        claims: Places that can be served.
        refusals: (fusion, refusal) for places and requests that cannot.
    """

    model: str
    facts: Facts
    config: AccelConfig
    claims: tuple[Claim, ...]
    refusals: tuple[tuple[str, Refusal], ...]

    def __str__(self) -> str:
        title = f"Plan for {self.model} on {self.facts.device_name} ({self.facts.device}); nothing is changed yet"
        return claim_table(title, self.claims) + reason_table(self.claims) + refusal_table(self.refusals)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, one entry per place."""
        return {
            "model": self.model,
            "device": self.facts.device,
            "claims": [_claim_dict(claim) for claim in self.claims],
            "refusals": [_refusal_dict(fusion, refusal) for fusion, refusal in self.refusals],
        }

    def to_json(self) -> str:
        """The plan as a JSON string."""
        return json.dumps(self.to_dict(), indent=2)


def make_plan(model: nn.Module, config: AccelConfig, facts: Facts, patches: tuple[Patch, ...]) -> Plan:
    """Ask every patch about every module of `model`, and change nothing.

    Raises:
        ValueError: a fusion asks for an implementation that does not exist, or two patches claim one place.
    """
    check_implementations(config, patches)
    claims: list[Claim] = []
    refusals: list[tuple[str, Refusal]] = []
    absent: list[str] = []
    devices = _devices(model, facts)
    for patch in patches:
        wanted = config.wanted(patch.fusion)
        if wanted is None:
            continue
        if wanted not in patch.kernel.names():
            wanted = AUTO  # also where one is named for all fusions that is unknown to this one
        context = Context(
            facts, devices, wanted, config.recompute, _taken_by(claims), config.fp8_recipe(), config.fp8_layers
        )
        found = _match_all(patch, model, context)
        own = [claim for claim in found if isinstance(claim, Claim)]
        refusals += [(patch.fusion, refusal) for refusal in found if isinstance(refusal, Refusal)]
        refusals += [(patch.fusion, refusal) for refusal in _refused_requests(own, wanted)]
        if not found:
            absent.append(patch.fusion)
        claims += own
    nothing = not claims and not refusals
    missed = (fusion for fusion in absent if nothing or config.is_explicit(fusion))
    refusals += [(fusion, Refusal("model", "has no such place", "nothing to do")) for fusion in missed]
    if config.recompute == "full" and (no := no_layers(model)) is not None:
        refusals.append(("recompute", no))
    _check_conflicts(claims)
    return Plan(type(model).__name__, facts, config, tuple(claims), tuple(refusals))


def check_implementations(config: AccelConfig, patches: tuple[Patch, ...]) -> None:
    """Whether the implementations that are named exist.

    Raises:
        ValueError: one does not, with the nearest right name.
    """
    for patch in patches:
        wanted, known = config.wanted(patch.fusion), [AUTO, *patch.kernel.names()]
        if config.is_explicit(patch.fusion) and wanted not in (None, *known):
            raise ValueError(unknown_name(f"implementation for {patch.fusion}", str(wanted), known))
    every = dict.fromkeys([AUTO, *(name for patch in patches for name in patch.kernel.names())])
    if config.implementation not in every:
        raise ValueError(unknown_name("implementation", config.implementation, every))


def _match_all(patch: Patch, model: nn.Module, context: Context) -> list[Claim | Refusal]:
    found: list[Claim | Refusal] = []
    taken: set[str] = set()
    for path, module in model.named_modules():
        match = patch.match(path, module, context)
        if isinstance(match, Claim):
            if taken.intersection(match.paths):
                continue  # the outer of two owners of one head serves it
            taken.update(match.paths)
        if match is not None:
            found.append(match)
    return found


def _taken_by(claims: list[Claim]) -> frozenset[str]:
    return frozenset(path for claim in claims for path in (claim.paths if claim.part == "forward" else claim.taken))


def _refused_requests(claims: list[Claim], wanted: str) -> Iterator[Refusal]:
    """A named implementation that cannot serve, once per reason."""
    if wanted == AUTO:
        return
    seen = set()
    for claim in claims:
        for device, choice in claim.choices.items():
            winner = choice.winner.name if choice.winner else None
            if winner != wanted and (reason := str(choice.refused[0])) not in seen:
                seen.add(reason)
                yield Refusal(
                    f"{claim.fusion}={wanted!r} on {device}", choice.refused[0].reason, f"{winner} serves instead"
                )


def _check_conflicts(claims: list[Claim]) -> None:
    owners: dict[tuple[str, str], Claim] = {}
    for claim in claims:
        for path in claim.paths:
            other = owners.setdefault((path, claim.part), claim)
            if other is not claim:
                raise ValueError(
                    f"the {claim.part} of {path or 'the model'} is claimed by {other.fusion} ({other.label}) and by {claim.fusion} "
                    f"({claim.label}); switch one off: apply(model, {claim.fusion}=False)."
                )


def _devices(model: nn.Module, facts: Facts) -> tuple[str, ...]:
    """Where the model is, and where this machine would train it; a model on meta is only the latter."""
    here = {parameter.device.type for parameter in model.parameters()} - {"meta", facts.device}
    return (*sorted(here), facts.device)


def claim_table(title: str, claims: tuple[Claim, ...], remark: Callable[[Claim], str] = lambda claim: "") -> str:
    """A table of claims, places of one kind in one row, each with a remark."""
    kinds: dict[tuple[str, str, str, str], list[str]] = {}
    for claim in claims:
        kinds.setdefault((claim.fusion, _kernels(claim), claim.label, remark(claim)), []).append(claim.paths[-1])
    rows = [
        (fusion, str(len(at)), kernel, "\n".join(filter(None, (label, said, grouped_places(at)))))
        for (fusion, kernel, label, said), at in kinds.items()
    ]
    return table(title, ("fusion", "places", "kernel", "what and where"), rows)


def reason_table(claims: tuple[Claim, ...]) -> str:
    """A table of why each implementation was taken, fusions with one reason in one row; empty where there are no claims."""
    fusions: dict[tuple[str, str], list[str]] = {}
    for claim in claims:
        for device, choice in claim.choices.items():
            if choice.winner is not None:
                fusions.setdefault((f"{choice.winner.name} ({device})", choice.why), []).append(claim.fusion)
    rows = [(kernel, f"{why}\n{', '.join(dict.fromkeys(of))}") for (kernel, why), of in fusions.items()]
    return "\n" + table("Why these", ("kernel", "why and for what"), rows) if rows else ""


def refusal_table(refusals: tuple[tuple[str, Refusal], ...]) -> str:
    """A table of refusals, places with one reason in one row; empty where there are none."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for fusion, refusal in refusals:
        kinds.setdefault((fusion, refusal.reason, refusal.remedy), []).append(refusal.what)
    rows = [
        (fusion, str(len(at)), f"{why}{so and '; '}{so}\n{grouped_places(at)}")
        for (fusion, why, so), at in kinds.items()
    ]
    return "\n" + table("Refused", ("fusion", "places", "why and where"), rows) if rows else ""


def _kernels(claim: Claim) -> str:
    return "\n".join(
        f"{choice.winner.name if choice.winner else 'original'} ({device})" for device, choice in claim.choices.items()
    )


def _claim_dict(claim: Claim) -> dict[str, Any]:
    kernels = {device: choice.winner.name if choice.winner else None for device, choice in claim.choices.items()}
    why = {device: choice.why for device, choice in claim.choices.items()}
    why_not = {device: [str(refusal) for refusal in choice.refused] for device, choice in claim.choices.items()}
    return {
        "fusion": claim.fusion,
        "paths": list(claim.paths),
        "recognised_as": claim.label,
        "dtype": str(claim.dtype),
        "kernels": kernels,
        "why": why,
        "passed_over": why_not,
    }


def _refusal_dict(fusion: str, refusal: Refusal) -> dict[str, str]:
    return {"fusion": fusion, "what": refusal.what, "reason": refusal.reason, "remedy": refusal.remedy}
