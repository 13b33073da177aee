"""Delayed scaling in whole models: trains as current scaling does, counts what saturates, and is undone without a trace."""

import copy
import json
from typing import Any

import pytest
import torch

import automodel_accel as accel
from automodel_accel.kernels.fp8_linear import delayed
from automodel_accel.kernels.fp8_linear.casts import Cast
from automodel_accel.kernels.fp8_linear.history import History
from automodel_accel.patches.fp8 import HISTORIES
from tests.swap.compare import assert_equal, step
from tests.swap.test_fp8 import _pickled, adapted, fp8, served, train
from tests.tiny import batch, tiny


def histories(model: torch.nn.Module) -> list[Any]:
    return [vars(child)[HISTORIES] for child in model.modules() if HISTORIES in vars(child)]


def test_the_first_step_has_current_scales() -> None:
    model = tiny()
    assert_equal(step(fp8(model, "delayed"), **batch()), step(fp8(model), **batch()))


def test_trains_as_current_scaling_does() -> None:
    model = tiny()
    ours, theirs = fp8(model, "delayed"), fp8(model)
    found, expected = train(ours, steps=20), train(theirs, steps=20)
    assert found[-1] < 0.7 * found[0]
    assert found[-1] == pytest.approx(expected[-1], rel=0.05)
    assert served(ours) == 20 * 2 * 2 * 4
    assert {(one.x.calls, one.gradients.calls) for one in histories(ours)} == {(40, 40)}
    assert len(histories(ours)) == 2 * 4


def test_the_report_says_how_many_values_saturated() -> None:
    ours = fp8(tiny(), "delayed")
    row = "fp8: values saturated by a delayed scale"
    assert row not in str(accel.report(ours))
    step(ours, **batch())
    assert json.loads(accel.report(ours).to_json())["saturated"] == 0
    step(ours, **batch())
    settled = accel.report(ours).counts.saturated
    (ours(**batch()).loss * 1000).backward()
    report = accel.report(ours)
    saturated = sum(one.x.saturated().item() + one.gradients.saturated().item() for one in histories(ours))
    assert saturated > settled
    assert json.loads(report.to_json())["saturated"] == saturated
    assert [line for line in str(report).splitlines() if row in line and str(saturated) in line]
    assert row not in str(accel.report(fp8(tiny())))


def test_a_scaler_skips_a_step_that_is_not_finite() -> None:
    """The step after it has scales as if it had not been."""
    model = tiny()
    ours, undisturbed = fp8(model, "delayed"), fp8(model, "delayed")
    for one in (ours, undisturbed):
        step(one, **batch())
    (ours(**batch()).loss * float("inf")).backward()
    assert not any(gradient.isfinite().all() for name, gradient in _gradients(ours).items() if "q_proj" in name)
    ours.zero_grad()
    assert_equal(step(ours, **batch()), step(undisturbed, **batch()))


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("recompute", ["selective", "mlp"])
def test_recompute_gives_the_same_bits(recompute: str) -> None:
    """What is computed again takes the scale of forward."""
    model = tiny()
    ours, theirs = fp8(model, "delayed", recompute=recompute), fp8(model, "delayed")
    for _ in range(3):
        assert_equal(step(ours, **batch()), step(theirs, **batch()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_run_a_call_twice(reentrant: bool) -> None:
    ours: Any = fp8(tiny(), "delayed")
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    losses = train(ours, steps=3)
    assert losses[-1] < losses[0]
    assert {(one.x.calls, one.gradients.calls) for one in histories(ours)} == {(12, 6)}


def test_copies_pickles_and_revert() -> None:
    """A copy begins with no history and is counted in the same report; the model after revert has its own bits."""
    model = tiny()
    ours = fp8(model, "delayed")
    step(ours, **batch())
    other = copy.deepcopy(ours)
    assert histories(other) == histories(_pickled(ours)) == []
    assert_equal(step(other, **batch()), step(fp8(model), **batch()))
    assert len(accel.report(ours).counts.histories) == 2 * len(histories(ours))
    assert_equal(step(accel.revert(ours), **batch()), step(model, **batch()))
    assert not any("_accel_" in name for child in ours.modules() for name in vars(child))


def test_adapters_on_a_frozen_base() -> None:
    ours = fp8(adapted(), "delayed")
    losses = train(ours, steps=5)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(train(fp8(adapted()), steps=5), rel=0.02)


@pytest.mark.parametrize("of_gradients", [False, True])
def test_the_proof_casts_by_a_history(of_gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that no first call makes is found before anything is swapped."""
    right = delayed.cast

    def wrong(tensors: Any, dtype: Any, history: History, **asked: Any) -> Cast:
        made = right(tensors, dtype, history, **asked)
        mistaken = history.calls > 1 and ("straight" in asked) == of_gradients
        return Cast(made.q, made.q_t, made.scale * 2) if mistaken else made

    monkeypatch.setattr(delayed, "cast", wrong)
    report = accel.report(fp8(tiny(), "delayed"))
    assert report.places("fp8") == 0
    assert [no for fusion, no in report.refusals if fusion == "fp8"]
