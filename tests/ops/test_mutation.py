"""The harness for mutants: what it takes for caught, and what it leaves behind."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from automodel_accel.kernels import rms_norm as package
from automodel_accel.kernels.contract import implementation_module
from tests.ops.mutation import Mutant, check_caught, mutated

EPS_FORGOTTEN = Mutant("rms_norm/eager.py", "x_wide.pow(2).mean(-1) + eps", "x_wide.pow(2).mean(-1)", "eps forgotten")


def normalised(rms_norm_package: ModuleType) -> torch.Tensor:
    """The norm of ones with an eps of 3: one half, and one where the eps is forgotten."""
    y = rms_norm_package.rms_norm(torch.ones(1, 4), None, 3.0, implementation="torch")
    assert isinstance(y, torch.Tensor)
    return y


def test_a_mutant_is_in_force_inside_and_gone_afterwards(tmp_path: Path) -> None:
    with mutated(EPS_FORGOTTEN, tmp_path) as mutant_package:
        assert torch.equal(normalised(mutant_package), torch.ones(1, 4))
    assert torch.equal(normalised(package), torch.full((1, 4), 0.5))
    real = implementation_module(package.KERNEL, "cpu", torch.float32, 4, "torch")
    assert real.__name__ == "automodel_accel.kernels.rms_norm.eager"


def test_a_mutant_of_host_code_leaves_the_real_operation_alone(tmp_path: Path) -> None:
    call = "_call(x, weight, eps, offset"
    with mutated(
        Mutant("rms_norm/__init__.py", call, call.replace("eps", "0.0"), "eps lost"), tmp_path
    ) as mutant_package:
        assert mutant_package is not package
        assert torch.equal(normalised(mutant_package), torch.ones(1, 4))
        assert torch.equal(normalised(package), torch.full((1, 4), 0.5))
    assert torch.equal(
        torch.ops.automodel_accel.rms_norm(torch.ones(1, 4), None, 3.0, 0.0, "cast_then_mul", "torch")[0],
        torch.full((1, 4), 0.5),
    )


def test_a_mutant_that_survives_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="survived: eps forgotten"):
        check_caught(EPS_FORGOTTEN, lambda rms_norm_package: None, tmp_path)


def test_a_crash_is_not_a_catch(tmp_path: Path) -> None:
    crash = Mutant("rms_norm/eager.py", "x_wide.pow(2)", "x_wide.power(2)", "no such method")
    with pytest.raises(AttributeError):
        check_caught(crash, normalised, tmp_path)


@pytest.mark.parametrize("old", ["no such text", "x_NH"])
def test_the_text_to_replace_stands_exactly_once(tmp_path: Path, old: str) -> None:
    with (
        pytest.raises(AssertionError, match="times in rms_norm"),
        mutated(Mutant("rms_norm/eager.py", old, "", ""), tmp_path),
    ):
        pass
