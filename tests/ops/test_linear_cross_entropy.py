"""linear_cross_entropy against its definition: values, gradients, memory and properties."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_accel.kernels import linear_cross_entropy as package
from tests.ops import checks
from tests.ops.checks_linear_cross_entropy import (
    EVERYTHING,
    EXACT,
    FORMS,
    IMPLEMENTATIONS,
    OPTIONS,
    SEVERAL_BLOCKS,
    TWO_ROWS,
    Options,
    check_all_ignored,
    check_autocast,
    check_bits,
    check_ignored_rows,
    check_in_orders,
    check_memory,
    check_rows,
    check_scale,
    check_target_out_of_range,
    check_values,
    module_of,
    operation,
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(implementation: str, dtype: torch.dtype, options: Options) -> None:
    check_values(operation(implementation, **options), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab", [1, 2, 63, 1000, 4097])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["mean", "everything"])
def test_shapes(implementation: str, vocab: int, options: Options) -> None:
    one = operation(implementation, vocab, **options)
    check_values(one, torch.float32)
    for rows in (0, 1, 7):
        checks.check_shape(one, torch.bfloat16, (rows, 8), draws=2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab", [1, 2, 63, 4097])
def test_shapes_with_z_loss(implementation: str, vocab: int) -> None:
    """Where the target has nearly all of the probability, what z-loss adds must not cancel; few classes take many draws."""
    one = operation(implementation, vocab, **EVERYTHING, z_loss=0.05)
    check_in_orders(one, (16, 32), draws=16 if vocab < 63 else 2)
    for rows in (0, 1, 7):
        checks.check_shape(one, torch.bfloat16, (rows, 8), draws=2)


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(
    implementation=st.sampled_from(IMPLEMENTATIONS),
    shape=st.tuples(st.integers(0, 9), st.integers(1, 20)),
    vocab=st.integers(2, 2100),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    bias=st.booleans(),
    scale=st.sampled_from((1.0, 0.25, -2.0)),
    softcap=st.sampled_from((None, 1.5, 30.0)),
    label_smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    z_loss=st.sampled_from((0.0, 1e-4, 0.1)),
    reduction=st.sampled_from(package.REDUCTIONS),
    workspace_bytes=st.one_of(st.none(), st.integers(1, 20_000)),
)
def test_drawn(implementation: str, shape: tuple[int, int], vocab: int, dtype: torch.dtype, **options: Any) -> None:
    checks.check_shape(operation(implementation, vocab, **options), dtype, shape, draws=1)


JUDGED: tuple[checks.Check, ...] = (checks.check_magnitudes, checks.check_frozen_inputs)
NONE_IGNORED: Options = {"ignored": 0.0}  # torch lets NaN pass through an ignored token; ours does not
PROPERTIES: tuple[tuple[str, Options, tuple[checks.Check, ...]], ...] = (
    ("mean", {}, (*EXACT, *JUDGED)),
    ("two rows a chunk", {**OPTIONS["softcap"], "workspace_bytes": TWO_ROWS}, EXACT),
    ("none", {"reduction": "none"}, (*EXACT, *JUDGED, checks.check_layouts)),
    ("everything", {**NONE_IGNORED, **EVERYTHING}, (*JUDGED, checks.check_layouts, checks.check_not_finite)),
    ("mean, none ignored", NONE_IGNORED, (checks.check_not_finite,)),
)
CASES = [
    pytest.param(options, check, id=f"{check.__name__}: {name}") for name, options, some in PROPERTIES for check in some
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("options", "check"), CASES)
def test_properties(implementation: str, options: Options, check: checks.Check) -> None:
    for dtype in checks.DTYPES if check in EXACT else (torch.bfloat16, torch.float16):
        check(operation(implementation, **options), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
def test_rows(implementation: str, dtype: torch.dtype) -> None:
    for vocab in (100, SEVERAL_BLOCKS[implementation]):
        for form in FORMS:
            check_rows(module_of(implementation, dtype), dtype, vocab, *form)


SINGLE: tuple[Callable[[str], None], ...] = (check_all_ignored, check_ignored_rows, check_bits, check_autocast)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("check", SINGLE, ids=lambda check: check.__name__)
def test_details(implementation: str, check: Callable[[str], None]) -> None:
    check(implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scale(implementation: str) -> None:
    check_scale(module_of(implementation))


def test_target_out_of_range_where_the_host_does_not_look() -> None:
    check_target_out_of_range(module_of("triton"))


def test_memory() -> None:
    check_memory("torch" if checks.DEVICE == "cpu" else "triton")  # Triton's interpreter copies what it is given


def test_gradients_by_finite_differences() -> None:
    for options in ({}, EVERYTHING, OPTIONS["two rows a chunk"], OPTIONS["a class ignored"]):
        one = operation("torch", 7, **options)
        *floats, target = one.draw((5, 3), torch.float64)
        leaves = tuple(x.requires_grad_() for x in floats if x is not None)
        assert torch.autograd.gradcheck(lambda *x: one.ours(*x, target), leaves)  # noqa: B023
