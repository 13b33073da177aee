"""The proof on the spot: the real kernel against the original module, on the real device and dtype, before anything is swapped.

Forward and backward, and neither the inputs nor the incoming gradient may be written to: a model uses them elsewhere. Places
with the same structure are proved once.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from automodel_accel.kernels.contract import CannotServeError, Choice, Refusal, kernel_errors
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


def prove_all(
    claims: Iterable[Claim], patches: Mapping[str, Patch], modules: Mapping[str, nn.Module]
) -> dict[Hashable, Proof]:
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
            name, excess, problem = _first_to_serve(partial(patch.experiment, claim, module, key), choice)
            if problem is None:
                proven[key] = name
                worst = max(worst, excess)
            else:
                failed[key] = problem
        if native in failed:
            refusal = f"the proof of {choice.winner.name} failed for {_named(native)}: {failed[native]}"
    return Proof(proven, failed, worst, refusal)


def proof_refusal(claim: Claim, proof: Proof) -> Refusal | None:
    """The refusal of one place whose kind failed its proof."""
    return Refusal(claim.paths[-1], proof.refusal, "the original forward stays") if proof.refusal else None


def _first_to_serve(set_up: Callable[[str], Experiment], choice: Choice) -> tuple[str, float, str | None]:
    """The winner, or where it does not serve this call the next that does; its largest excess, and what went wrong, if anything.

    Only a refusal moves on to the next: one that is wrong is wrong.
    """
    assert choice.winner is not None
    names = [choice.winner.name, *(other.name for other in choice.others)]
    for name in names[:-1]:
        try:
            return name, *_try(partial(set_up, name))
        except CannotServeError:
            continue
    try:
        return names[-1], *_try(partial(set_up, names[-1]))
    except CannotServeError as error:
        return names[0], float("nan"), str(error)


def _try(set_up: Callable[[], Experiment]) -> tuple[float, str | None]:
    """The largest excess over all outputs and gradients, and what went wrong, if anything."""
    try:
        experiment = set_up()
        truth = _run(experiment.truth, experiment, torch.float64)
        theirs = _run(experiment.theirs, experiment, None)
        ours = _run(experiment.ours, experiment, None)
    except CannotServeError:
        raise
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
    """Output and every gradient; raises where an input or the incoming gradient is written to: both may be used elsewhere."""
    rounded = {name: tensor.to(experiment.dtypes[name]) for name, tensor in experiment.inputs.items()}
    leaves = {name: tensor.to(dtype or tensor.dtype).detach().requires_grad_() for name, tensor in rounded.items()}
    inputs = {**leaves, "x": leaves["x"] * 1}  # x is no leaf, as in a model
    watched = {name: (tensor.detach(), tensor.detach().clone()) for name, tensor in inputs.items()}
    with _autocast(experiment, inputs["x"].device) if dtype is None else nullcontext():
        output = function(inputs)
    if not output.requires_grad:
        raise RuntimeError("its output has no gradient")

    def watch(gradient: torch.Tensor) -> None:
        watched["the incoming gradient"] = gradient, gradient.clone()

    output.register_hook(watch)  # type: ignore[no-untyped-call]
    (output * _weights(output)).sum().backward()  # type: ignore[no-untyped-call]
    for name, (tensor, before) in watched.items():
        if not torch.equal(tensor, before):
            raise RuntimeError(f"{name} was written to")
    return {
        "output": output.detach(),
        **{f"gradient of {name}": _gradient(name, leaf) for name, leaf in leaves.items()},
    }


def _gradient(name: str, leaf: torch.Tensor) -> torch.Tensor:
    if leaf.grad is None:
        raise RuntimeError(f"{name} received no gradient")
    return leaf.grad


def _weights(like: torch.Tensor) -> torch.Tensor:
    if like.dim() == 0:
        return torch.full_like(like, 0.5)  # scales exactly, so that where a kernel applies it costs no rounding
    generator = torch.Generator().manual_seed(2)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).bfloat16().to(like.device, like.dtype)


def _autocast(experiment: Experiment, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, experiment.autocast) if experiment.autocast else nullcontext()


def _named(key: CallKey) -> str:
    return ", ".join(str(part) for part in key)
