"""The report: what was done to a model, refused, proved and measured."""

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from automodel_accel.kernels.contract import Refusal
from automodel_accel.patches.contract import Claim, Counts
from automodel_accel.plan import Plan, claim_table, refusal_table
from automodel_accel.prove import Proof
from automodel_accel.tables import table


@dataclass(frozen=True, slots=True)
class Report:
    """What `apply` did, and what has been counted since. `print` it; `to_json()` for machines.

    Attributes:
        plan: What was found on the untouched model.
        applied: The claims that were swapped in.
        refusals: (fusion, refusal): those of the plan, and places whose proof failed.
        proofs: By `Claim.proof_key`.
        counts: Calls since `apply`, outside of compiled graphs; a deep copy of the model counts here too.
        mesh: How the model was spread over processes, in words; empty where it was not.
    """

    plan: Plan
    applied: tuple[Claim, ...]
    refusals: tuple[tuple[str, Refusal], ...]
    proofs: Mapping[Hashable, Proof]
    counts: Counts
    mesh: str = ""

    @property
    def materialised_logits(self) -> int:
        """How often real logits were built in training steps with labels; 0 is the aim."""
        return self.counts.materialised.total()

    def places(self, fusion: str) -> int:
        """How many places of a fusion ("norm", "mlp", "loss"...) were swapped."""
        return sum(claim.fusion == fusion for claim in self.applied)

    def __str__(self) -> str:
        title = f"{self.plan.model}: {len(self.applied)} places swapped and proved"
        if self.plan.config.recompute:
            title += f", recompute={self.plan.config.recompute!r}"
        if self.mesh:
            title += f"; {self.mesh}"
        text = claim_table(title, self.applied, self._proof_text)
        text += refusal_table(self.refusals)
        return text + "\n" + table("Since then", ("what", "calls"), self._count_rows())

    def _proof_text(self, claim: Claim) -> str:
        proof = self.proofs[claim.proof_key]
        return f"{len(proof.proven)} calls proved, at {proof.excess:.0%} of the error allowed"

    def _count_rows(self) -> list[tuple[str, str]]:
        fused = [(f"{fusion}: by a kernel", str(number)) for fusion, number in self.counts.fused.items()]
        passed = [(f"{reason}: by the original", str(number)) for reason, number in self.counts.passed_on.items()]
        asked = ", ".join(f"{why} x{number}" for why, number in self.counts.materialised.items())
        saturated = [("fp8: values saturated by a delayed scale", str(self.counts.saturated))]
        return [
            *fused,
            *passed,
            *(saturated if self.counts.histories else []),
            ("materialised logits" + (f" ({asked})" if asked else ""), str(self.materialised_logits)),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        plan = self.plan.to_dict()
        applied = {(claim.fusion, claim.paths) for claim in self.applied}
        return {
            "model": self.plan.model,
            "device": plan["device"],
            "mesh": self.mesh,
            "applied": [claim for claim in plan["claims"] if (claim["fusion"], tuple(claim["paths"])) in applied],
            "refusals": [
                {"fusion": fusion, "what": no.what, "reason": no.reason, "remedy": no.remedy}
                for fusion, no in self.refusals
            ],
            "proofs": [_proof_dict(key, proof) for key, proof in self.proofs.items()],
            "calls": dict(self.counts.fused),
            "passed_on": dict(self.counts.passed_on),
            "materialised_logits": self.materialised_logits,
            "materialised_by": dict(self.counts.materialised),
            "saturated": self.counts.saturated,
        }

    def to_json(self) -> str:
        """The report as a JSON string."""
        return json.dumps(self.to_dict(), indent=2)


def _proof_dict(key: Hashable, proof: Proof) -> dict[str, Any]:
    fusion, form, dtype = cast("tuple[str, object, object]", key)
    return {
        "fusion": fusion,
        "kind": str(form),
        "dtype": str(dtype),
        "proven": [", ".join(map(str, call)) for call in proof.proven],
        "failed": {", ".join(map(str, call)): problem for call, problem in proof.failed.items()},
        "share_of_allowed_error": proof.excess,
        "refused": proof.refusal,
    }
