"""`fp8_linears` by Transformer Engine's casts: where it is not installed, by a stand-in of its quantiser."""

import dataclasses

import pytest
import torch

import automodel_accel as accel
from automodel_accel.kernels import fp8_linear
from automodel_accel.kernels.contract import Spec
from automodel_accel.kernels.fp8_linear import KERNEL, Recipe, features
from tests.ops import checks
from tests.ops.test_fp8_linear import SHAPES, operation
from tests.ops.test_implementations import HOPPER, named, te_stood_in_for

bf16 = torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for the package")
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(wide_gradients=True)], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_equals_the_definition(dtype: torch.dtype, recipe: Recipe) -> None:
    with te_stood_in_for("fp8_linear"):
        for shape in SHAPES:
            checks.check_shape(operation(recipe), dtype, shape)


def test_refused_where_it_is_not_installed_or_not_on_hopper_or_rowwise() -> None:
    te, plain = named(KERNEL, "te"), Spec("cuda", bf16, 64)
    assert te.objection(HOPPER, plain) is None
    assert "not installed" in str(te.objection(dataclasses.replace(HOPPER, packages={}), plain))
    assert "this is sm_100" in str(te.objection(dataclasses.replace(HOPPER, arch="sm_100"), plain))
    rowwise = dataclasses.replace(plain, features=features(Recipe(rowwise=True)))
    assert "one for each row" in str(te.objection(HOPPER, rowwise))
    delayed = dataclasses.replace(plain, features=features(Recipe(delayed=True)))
    assert "of the calls before" in str(te.objection(HOPPER, delayed))
    assert fp8_linear.LACKS.keys() == rowwise.features | delayed.features


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without it")
def test_asked_for_by_name_without_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    with pytest.raises(accel.RefusedError, match="te"):
        accel.apply(model, fp8="te", strict=True)
    assert type(model[0]) is torch.nn.Linear, "nothing is half applied"
    said = " ".join(str(accel.plan(model, fp8="te")).split())
    assert 'fp8="te": cpu' in said
