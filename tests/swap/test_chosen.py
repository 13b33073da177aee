"""Which implementation serves a place, and why: named for all fusions or for one, or measured; and the proof's next choice."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import automodel_accel as accel
from automodel_accel import prove
from automodel_accel.config import AccelConfig
from automodel_accel.kernels import preference
from automodel_accel.kernels.contract import CannotServeError, Choice
from automodel_accel.kernels.preference import write_preferences
from automodel_accel.kernels.rms_norm import KERNEL
from automodel_accel.patches.contract import Experiment
from automodel_accel.plan import all_patches, make_plan
from tests.ops.test_contract import machine
from tests.ops.test_preference import measured
from tests.tiny import tiny

PACKAGES = {"triton": "3.6.0", "liger-kernel": "0.8.5", "transformer-engine": "2.20.2"}
H100 = dataclasses.replace(machine("cuda", PACKAGES), device_name="NVIDIA H100")


def test_one_name_for_all_fusions_is_taken_where_it_exists() -> None:
    found = accel.plan(tiny(), implementation="sdpa").to_dict()
    why = {claim["fusion"]: set(claim["why"].values()) for claim in found["claims"]}
    assert why.pop("attention") == {"named by you"}
    assert all(reasons == {"the only one that serves float32 here"} for reasons in why.values())
    own = accel.plan(tiny(), implementation="torch", norm="auto", mlp=False).to_dict()["claims"]
    assert {claim["why"]["cpu"] for claim in own} == {"named by you"}
    assert "mlp" not in {claim["fusion"] for claim in own}


def test_a_name_that_a_fusion_of_several_operations_lacks_is_refused_for_that_place() -> None:
    plan = make_plan(tiny("gpt_neox"), AccelConfig(mlp="liger"), H100, all_patches())
    assert [str(no) for fusion, no in plan.refusals if fusion == "mlp"] == [
        "mlp='liger' on cpu: does not implement activation; torch serves instead",
    ]


def test_the_plan_names_the_measured_one_and_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "preference.json"
    monkeypatch.setattr(preference, "TABLE", path)
    size = {"sizes": {"hidden": 32}, "dtype": "float32", "case": "rms_norm"}
    write_preferences([measured("triton", 1.0, **size), measured("liger", 0.8, **size)], path)
    plan = make_plan(tiny(), AccelConfig(), H100, all_patches())
    (norm, *_) = (claim for claim in plan.claims if claim.fusion == "norm")
    assert norm.choices["cuda"].winner is not None
    assert norm.choices["cuda"].winner.name == "liger"
    assert "fastest measured on NVIDIA H100: 0.80 x the time of triton" in " ".join(str(plan).split())
    assert json.loads(plan.to_json())["claims"][0]["why"]


def experiment(error: Exception | None) -> Experiment:
    """A linear beside itself, or an implementation that raises."""

    def ours(leaves: Any) -> torch.Tensor:
        if error is not None:
            raise error
        return leaves["x"] * 2  # type: ignore[no-any-return]

    x = torch.linspace(-1, 1, 8, dtype=torch.float64)
    double = lambda leaves: leaves["x"] * 2  # noqa: E731
    return Experiment(inputs={"x": x}, dtypes={"x": torch.float32}, theirs=double, ours=ours, truth=double)


@pytest.mark.parametrize(
    ("errors", "served", "problem"),
    [
        ({}, "triton", None),
        ({"triton": CannotServeError("no")}, "torch", None),
        ({"triton": CannotServeError("no"), "torch": CannotServeError("neither")}, "triton", "neither"),
        ({"triton": ValueError("broken")}, "triton", "ValueError: broken"),
    ],
)
def test_the_proof_moves_on_from_a_refusal_and_from_nothing_else(
    errors: dict[str, Exception], served: str, problem: str | None
) -> None:
    triton, torch_, *_ = KERNEL.implementations
    choice = Choice("norm", triton, (), "", (torch_,))
    name, _, said = prove._first_to_serve(lambda name: experiment(errors.get(name)), choice)
    assert (name, said) == (served, problem)
