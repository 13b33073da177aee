"""Which models of a script are applied under `automodel_accel.run`, and when. One process tries everything (scripts/moments.py)."""

import json
from typing import Any

import pytest

from automodel_accel.building import POINTS
from tests.loops.processes import RUN, SCRIPTS, Outcome, python

LATE: dict[str, Any] = {"before": False, "after": True}


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return python(*RUN, SCRIPTS / "moments.py")


@pytest.fixture(scope="module")
def found(outcome: Outcome) -> dict[str, dict[str, Any]]:
    assert outcome.code == 0, outcome.errors
    scenarios: dict[str, dict[str, Any]] = json.loads(outcome.output.splitlines()[0])
    return scenarios


def test_before_an_optimizer_is_used(found: dict[str, Any]) -> None:
    assert found["optimizer"] == {**LATE, "all": True}
    assert found["two_models"] == {"first": True, "second": True}


def test_first_call_without_an_optimizer(found: dict[str, Any]) -> None:
    assert found["own_descent"] == {**LATE, "first_call_fused": True, "same": True}
    assert found["evaluation"] == {"after": True}


def test_after_everything_that_a_script_does_to_a_model(found: dict[str, Any]) -> None:
    late = found["late_changes"]
    assert (late["before"], late["after"]) == (False, True)
    assert "torch.bfloat16" in late["dtypes"], "applied after the cast"
    assert found["adapters_without_an_optimizer"] == {**LATE, "same": True}


@pytest.mark.parametrize("wrapper", ["ddp", "ddp_of_peft", "fsdp1", "fsdp2_layer", "prepare", "prepare_model"])
def test_before_a_wrapper(found: dict[str, Any], wrapper: str) -> None:
    assert found["wrappers"][wrapper]


def test_before_deepspeed(found: dict[str, Any]) -> None:
    assert found["deepspeed"] == {"after": True}


def test_trainer(found: dict[str, Any]) -> None:
    trainer = found["trainer"]
    assert trainer["plain"]
    assert trainer["norms_by_callback"] == 0, "a Trainer with an AccelCallback is left to it, with its settings"


def test_liger_in_the_trainer_is_refused_with_both_ways_out(found: dict[str, Any]) -> None:
    assert not found["trainer"]["liger_applied"]
    assert "Set use_liger_kernel=False, or run the script with python" in found["trainer"]["liger"]


def test_only_the_outermost_of_models_in_models(found: dict[str, Any]) -> None:
    assert found["outermost"] == {"after": True, "model": "LlavaForConditionalGeneration", "applied": 1}


def test_copies(found: dict[str, Any]) -> None:
    assert found["copies"] == {
        **{"reference_before": False, "reference": True, "unpickled": True},  # copied before it was applied
        **{"policy": True, "noticing": False, "averaged": True, "again": 0},  # copied afterwards
    }


def test_model_that_the_script_applied_is_left_alone(found: dict[str, Any]) -> None:
    assert found["by_the_script"] == {"lines": 0, "norms": 0}


def test_model_in_which_nothing_can_be_swapped_runs_on(found: dict[str, Any]) -> None:
    assert found["nothing_to_swap"]["output"] == [1.0, 1.0, 1.0]
    warning, line = found["nothing_to_swap"]["lines"]
    assert warning.startswith("nothing in this Plain could be swapped")
    assert line.startswith("Plain: 0 places swapped")
    assert line.endswith("--accel.report=FILE.json says why")


def test_models_are_held_weakly(found: dict[str, Any]) -> None:
    assert found["dropped"] == {"alive": False, "noticed": True, "after": False}


def test_an_error_in_forward_is_the_model_s(found: dict[str, Any]) -> None:
    ours, vanilla = found["an_error_in_forward"]["said"]
    assert ours == vanilla


def test_nothing_of_ours_runs_in_a_step(found: dict[str, Any]) -> None:
    assert found["a_step"] == {"called": [], "noticing": False}


def test_wrapped_functions_look_as_they_did(found: dict[str, Any]) -> None:
    signatures = found["signatures"]
    assert signatures["wrapped"] == len(POINTS)
    assert signatures["kept"]
    assert signatures["pickled"]
    assert signatures["constructor"] == ["config", "inputs", "kwargs"]


def test_everything_is_undone_at_the_end(outcome: Outcome, found: dict[str, Any]) -> None:
    last = json.loads(outcome.output.splitlines()[1])
    assert last["left"] == []
    assert "_OnImport" not in last["finders"]


def test_one_line_a_model(outcome: Outcome, found: dict[str, Any]) -> None:
    summaries = [line for line in outcome.lines if not line.startswith("nothing in this Plain could be swapped")]
    assert len(summaries) == len(outcome.lines) - 1
    assert all(" places swapped and proved in " in line for line in summaries), summaries
    assert sum(line.startswith("LlavaForConditionalGeneration: ") for line in outcome.lines) == 1
