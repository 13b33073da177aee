"""The proof on the spot: the real kernel against the original module, on the real device and dtype, before anything is swapped.

Forward and backward, with the input and the incoming gradient also used elsewhere: a kernel that writes into either is found
out. Places with the same structure are proved once.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from automodel_accel.kernels.contract import Refusal, kernel_errors
from automodel_accel.kernels.numerics import judge
from automodel_accel.patches.contract import CallKey, Claim, Experiment, Patch

Function = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Proof:
    """What one kind of place was proved to.

    Attributes:
        proven: Call -> implementation, for calls that passed.
        failed: Call -> what went wrong, with the number.
        excess: Largest error over what the rule allows, among the calls that passed; at most 1.
        refusal: Why the place is not swapped at all: its native call failed on a device. None where it is swapped.
    """

    proven: Mapping[CallKey, str]
    failed: Mapping[CallKey, str]
    excess: float
    refusal: str | None


def prove_all(claims: Iterable[Claim], patches: Mapping[str, Patch], modules: Mapping[str, nn.Module]) -> dict[Hashable, Proof]:
    """One proof per kind of place."""
    proofs: dict[Hashable, Proof] = {}
    for claim in claims:
        if claim.proof_key not in proofs:
            proofs[claim.proof_key] = prove(claim, patches[claim.fusion], modules[claim.paths[-1]])
    return proofs


def prove(claim: Claim, patch: Patch, module: nn.Module) -> Proof:
    """Prove the calls that `patch` names for `claim`, on every device that the claim is for."""
    proven: dict[CallKey, str] = {}
    failed: dict[CallKey, str] = {}
    worst = 0.0
    refusal = None
    for device, choice in claim.choices.items():
        if choice.winner is None:
            refusal = f"no implementation serves it on {device}: {'; '.join(map(str, choice.refused))}"
            continue
        native, *others = patch.keys(claim, device)
        for key in (native, *others):
            excess, problem = _try(patch.experiment(claim, module, key, choice.winner.name))
            if problem is None:
                proven[key] = choice.winner.name
                worst = max(worst, excess)
            else:
                failed[key] = problem
        if native in failed:
            refusal = f"the proof of {choice.winner.name} failed for {_named(native)}: {failed[native]}"
    return Proof(proven, failed, worst, refusal)


def proof_refusal(claim: Claim, proof: Proof) -> Refusal | None:
    """The refusal of one place whose kind failed its proof."""
    return Refusal(claim.paths[-1], proof.refusal, "the original forward stays") if proof.refusal else None


def _try(experiment: Experiment) -> tuple[float, str | None]:
    """The largest excess over all outputs and gradients, and what went wrong, if anything."""
    try:
        truth = _run(experiment.truth, experiment, torch.float64)
        theirs = _run(experiment.theirs, experiment, None)
        ours = _run(experiment.ours, experiment, None)
    except kernel_errors() as error:
        return float("nan"), f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    worst = 0.0
    for name, expected in truth.items():
        if ours[name].dtype != theirs[name].dtype:
            return float("nan"), f"{name} is {ours[name].dtype}, the original gives {theirs[name].dtype}"
        verdict = judge(ours[name], theirs[name], expected)
        if not verdict.passed:
            return verdict.excess, f"{name}: {verdict}"
        worst = max(worst, verdict.excess)
    return worst, None


def _run(function: Function, experiment: Experiment, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Output and every gradient; `x` and the gradient of the output are each used a second time."""
    rounded = {name: tensor.to(experiment.dtypes[name]) for name, tensor in experiment.inputs.items()}
    leaves = {name: tensor.to(dtype or tensor.dtype).detach().requires_grad_() for name, tensor in rounded.items()}
    x = leaves["x"] * 1  # no leaf, as in a model
    before = x.detach().clone()
    with torch.enable_grad():
        with _autocast(experiment, x.device) if dtype is None else nullcontext():
            output = function({**leaves, "x": x})
        sibling = torch.zeros_like(output, requires_grad=True)  # receives the very gradient that the output receives
        weighted = ((output + sibling) * _weights(output)).sum() + (x * _weights(x)).sum()
        weighted.backward()  # type: ignore[no-untyped-call]
    if not torch.equal(before, x.detach()):
        raise RuntimeError("the input was written to")
    gradients = {f"gradient of {name}": _gradient(leaf) for name, leaf in leaves.items()}
    return {"output": output.detach(), "gradient that the output shares": _gradient(sibling), **gradients}


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    if leaf.grad is None:
        raise RuntimeError("an input received no gradient")
    return leaf.grad


def _weights(like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).bfloat16().to(like.device, like.dtype)


def _autocast(experiment: Experiment, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, experiment.autocast) if experiment.autocast else nullcontext()


def _named(key: CallKey) -> str:
    return ", ".join(str(part) for part in key)
