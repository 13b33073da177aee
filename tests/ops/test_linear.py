"""linears against their definition: values, gradients, what they keep, and mistakes that must be caught."""

import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from automodel_accel.kernels import linear as package
from automodel_accel.kernels.numerics import judge
from automodel_accel.kernels.recompute import remember, source_of
from tests.ops import checks
from tests.ops.mutants_linear import SOURCES, VALUES
from tests.ops.mutation import Mutant, check_caught

WIDTHS = (5, 8, 3)  # of the outputs
# how torch's GEMM sums depends on the layout and on whether a graph is recorded: layouts are compared in float64, below
PROPERTIES = tuple(check for check in checks.PROPERTIES if check is not checks.check_layouts)


def operation(
    biases: tuple[bool, ...] = (True, False, True), noted: bool = False, linear_package: ModuleType = package
) -> checks.Operation:
    """Linears of one input, all outputs in a row."""
    count = len(biases)

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        weights = [checks.normal(generator, (width, shape[-1]), dtype) for width in WIDTHS[:count]]
        drawn = [checks.normal(generator, (width,), dtype) if wanted else None for width, wanted in zip(WIDTHS, biases)]
        return checks.normal(generator, shape, dtype), *weights, *drawn

    def joined(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([output.flatten() for output in outputs])

    def ours(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if noted:
            y = x * 1
            remember(y, lambda saved: saved * 1, x)
            return joined(linear_package.linears(y, rest[:count], rest[count:], source=source_of(y)))
        return joined(linear_package.linears(x, rest[:count], rest[count:]))

    def theirs(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return joined(package.reference.linears(x, rest[:count], rest[count:]))

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs)


@pytest.mark.parametrize("noted", [False, True], ids=["input", "source"])
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shapes(count: int, dtype: torch.dtype, noted: bool) -> None:
    for biases in itertools.product((True, False), repeat=count):
        for shape in ((2, 4, 64), (1, 1), (3, 7), (0, 8), (9,)):
            checks.check_shape(operation(biases, noted), dtype, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_properties(check: checks.Check, dtype: torch.dtype) -> None:
    check(operation(), dtype)
    check(operation(noted=True), dtype)


def leaves(count: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 6, generator=generator, dtype=dtype).requires_grad_()
    return x, [torch.randn(width, 6, generator=generator, dtype=dtype).requires_grad_() for width in WIDTHS[:count]]


def saved(function: Any) -> tuple[Any, list[torch.Tensor]]:
    """What the function returns, and the tensors that were saved for backward."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        return function(), kept


def check_what_is_kept(linear_package: ModuleType) -> None:
    """The source in place of the input; neither where no weight has a gradient; gradients are those of the input itself."""
    x, weights = leaves()
    y = x.detach() * 3
    y.requires_grad_()
    remember(y, lambda part: part * 3, x)
    source = source_of(y)
    outputs, kept = saved(lambda: linear_package.linears(y, weights, [None, None], source=source))
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in (*weights, x)]
    expected = package.reference.linears(y, weights, [None, None])
    for mine, theirs in zip(outputs, expected, strict=True):
        for a, b in zip(
            *(
                torch.autograd.grad(o.sum(), [y, *weights], allow_unused=True, retain_graph=True)
                for o in (mine, theirs)
            ),
            strict=True,
        ):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b)
    frozen = [weight.detach() for weight in weights]
    _, kept = saved(lambda: linear_package.linears(y, frozen, [None, None], source=source))
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in frozen}


def test_what_is_kept() -> None:
    check_what_is_kept(package)


@pytest.mark.parametrize(
    "layout", [lambda x: x.transpose(0, 1), lambda x: x[..., ::2], lambda x: x[:1].expand(3, -1, -1)]
)
def test_layouts(layout: Any) -> None:
    x, _ = leaves(dtype=torch.float64)
    given = layout(x)
    weights = [torch.randn(width, given.shape[-1], dtype=torch.float64, requires_grad=True) for width in WIDTHS]
    for ours, theirs in zip(
        package.linears(given, weights, [None] * 3), package.reference.linears(given, weights, [None] * 3), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        grads = [
            torch.autograd.grad(y.square().sum(), [x, *weights], allow_unused=True, retain_graph=True)
            for y in (ours, theirs)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_outputs_that_nobody_uses() -> None:
    """An output without a gradient gives its weight none, as in torch, and the others are right."""
    x, weights = leaves(3)
    package.linears(x, weights, [None] * 3)[1].sum().backward()
    found = [x.grad, *(weight.grad for weight in weights)]
    x.grad = None
    weights[1].grad = None
    package.reference.linears(x, weights, [None] * 3)[1].sum().backward()
    assert found[1] is None
    assert found[3] is None
    assert x.grad is not None
    assert weights[1].grad is not None
    torch.testing.assert_close(found[0], x.grad)
    torch.testing.assert_close(found[2], weights[1].grad)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weights = leaves()
    rounded = [x.detach().to(x_dtype), *(weight.detach().to(weight_dtype) for weight in weights)]
    found = []
    for function, dtype in (
        (package.linears, None),
        (package.reference.linears, None),
        (package.reference.linears, torch.float64),
    ):
        given = [tensor.to(dtype or tensor.dtype).clone().requires_grad_() for tensor in rounded]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            outputs = function(given[0], given[1:], [None, None])
        weighted = [
            (output.to(dtype or torch.float32) * torch.linspace(-1, 1, output.shape[-1]).to(dtype)).sum()
            for output in outputs
        ]
        torch.stack(weighted).sum().backward()
        found.append([*outputs, *(tensor.grad for tensor in given)])
    for ours, theirs, truth in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        verdict = judge(ours, theirs, truth)
        assert verdict.passed, verdict


def test_a_written_output_has_no_source() -> None:
    x, _ = leaves()
    y = x.detach() * 2
    remember(y, lambda part: part * 2, x)
    assert source_of(y) is not None
    y += 1
    assert source_of(y) is None


def test_a_source_written_to_before_backward_is_an_error() -> None:
    x, weights = leaves()
    part = x.detach().clone()
    y = (part * 2).requires_grad_()
    remember(y, lambda saved: saved * 2, part)
    first, _ = package.linears(y, weights, [None, None], source=source_of(y))
    part += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


def test_nothing_is_noted_without_gradients() -> None:
    x, _ = leaves()
    with torch.no_grad():
        y = x * 2
        remember(y, lambda part: part * 2, x)
    assert source_of(y) is None


def test_a_second_derivative_raises() -> None:
    x, weights = leaves()
    loss = package.linears(x, weights, [None, None])[0].square().sum()
    with pytest.raises(RuntimeError, match="linear cannot be differentiated twice"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    x, weights = leaves()
    y = x * 1
    remember(y, lambda part: part * 1, x)
    loss = sum(output.square().sum() for output in package.linears(y, weights, [None, None], source=source_of(y)))
    first = torch.autograd.grad(loss, [x, *weights], retain_graph=True)  # type: ignore[arg-type]
    for one, other in zip(first, torch.autograd.grad(loss, [x, *weights]), strict=True):  # type: ignore[arg-type]
        assert torch.equal(one, other)


def test_errors_say_what_came() -> None:
    x, weights = leaves()
    with pytest.raises(ValueError, match="2 weights and 1 biases"):
        package.linears(x, weights, [None])
    with pytest.raises(ValueError, match=r"shape \(6, 5\), expected \[F, 6\]"):
        package.linears(x, [weights[0].t()], [None])
    with pytest.raises(ValueError, match="liger"):
        package.linears(x, weights, [None, None], implementation="liger")


@pytest.mark.parametrize("mutant", VALUES, ids=lambda mutant: mutant.why)
def test_mutants_of_values_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    check_caught(
        mutant, lambda found: checks.check_shape(operation(linear_package=found), torch.float32, (3, 7)), tmp_path
    )


@pytest.mark.parametrize("mutant", SOURCES, ids=lambda mutant: mutant.why)
def test_mutants_of_what_is_kept_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    check_caught(mutant, check_what_is_kept, tmp_path)
