"""One training step, and the two ways in which an accelerated model's step is compared with vanilla's."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

import automodel_accel as accel
from automodel_accel.kernels.numerics import judge

FLOAT32_SHARE = 1e-5  # of the largest gradient element of the model
SMALLEST_SCALE = 1e-3  # of a parameter's gradient; some, such as a key's bias, are zero but for rounding


@dataclass(frozen=True, slots=True)
class Step:
    """Loss and gradient of every parameter that has one."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def step(model: nn.Module, *args: Any, **inputs: Any) -> Step:
    """Forward and backward from clean gradients."""
    model.zero_grad()
    loss = model(*args, **inputs).loss
    loss.backward()
    return Step(loss.detach(), gradients(model))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every gradient, by the parameter's name."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def only(*fusions: str) -> dict[str, str | bool]:
    """Settings for `apply` that switch the other fusions off."""
    return {**dict.fromkeys(fusions, "auto"), **others_off(*fusions)}


def others_off(*fusions: str) -> dict[str, bool]:
    """The same, which leaves how to serve these to other settings."""
    others = {"strict", "recompute", "implementation", "fp8_layers"}
    names = {field.name for field in fields(accel.AccelConfig)} - others - {*fusions}
    return dict.fromkeys(sorted(names), False)


def applied(model: nn.Module, **settings: Any) -> nn.Module:
    """An accelerated copy of the model."""
    return accel.apply(copy.deepcopy(model), **settings)


def assert_close(ours: Step, theirs: Step) -> None:
    """In float32: the same loss, the same parameters with a gradient, every gradient element within 1e-5 of the largest one."""
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert ours.gradients.keys() == theirs.gradients.keys()
    largest = max((g.nan_to_num().abs().max().item() for g in theirs.gradients.values() if g.numel()), default=0.0)
    for name, expected in theirs.gradients.items():
        got = ours.gradients[name]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
        torch.testing.assert_close(
            *(got, expected),
            rtol=0,
            atol=FLOAT32_SHARE * largest,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_equal(ours: Step, theirs: Step) -> None:
    """The same bits."""
    assert torch.equal(ours.loss, theirs.loss)
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert all(torch.equal(got, theirs.gradients[name]) for name, got in ours.gradients.items())


def assert_as_good(ours: Step, theirs: Step, truth: Step, dtype: torch.dtype) -> None:
    """Computed in `dtype`: the loss and the gradient, all parameters as one vector, are as near to the truth as vanilla's.

    Each parameter's share of the vector is scaled by its true root mean square, so that none hides behind a larger one.
    """
    assert ours.loss.dtype == theirs.loss.dtype
    assert {n: g.dtype for n, g in ours.gradients.items()} == {n: g.dtype for n, g in theirs.gradients.items()}
    scales = {name: g.double().square().mean().sqrt() for name, g in truth.gradients.items()}
    smallest = SMALLEST_SCALE * max(scales.values())
    scales = {name: scale.clamp_min(smallest) for name, scale in scales.items()}

    def vector(step: Step) -> torch.Tensor:
        return torch.cat([(step.gradients[name].double() / scale).flatten() for name, scale in scales.items()])

    for what, mine, vanilla, true in (
        ("loss", *(s.loss.double() for s in (ours, theirs, truth))),
        ("gradient", *(vector(s) for s in (ours, theirs, truth))),
    ):
        verdict = judge(mine.to(dtype), vanilla.to(dtype), true)
        assert verdict.passed, f"{what}: {verdict}"


@contextmanager
def frozen(model: nn.Module, *names: str) -> Iterator[None]:
    """Parameters whose name contains one of `names` need no gradient inside the block."""
    chosen = [p for name, p in model.named_parameters() if any(part in name for part in names)]
    before = [p.requires_grad for p in chosen]
    for parameter in chosen:
        parameter.requires_grad_(False)
    yield
    for parameter, was in zip(chosen, before, strict=True):
        parameter.requires_grad_(was)
