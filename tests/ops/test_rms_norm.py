"""rms_norm against its definition: values, gradients, properties, and mistakes that must be caught."""

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_accel.kernels import rms_norm as package
from tests.ops import checks
from tests.ops.mutants_rms_norm import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated

IMPLEMENTATIONS = ("triton", "torch")
WEIGHTS = ("same", "float32", "none")  # dtype of the weight
SHAPES = [shape for shape in checks.SHAPES if shape[-1] > 1]


def operation(
    implementation: str,
    order: str = "cast_then_mul",
    offset: float = 0.0,
    weight: str = "same",
    eps: float = 1e-6,
    rms_norm_package: ModuleType = package,
) -> checks.Operation:
    """rms_norm with its options fixed."""

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        x = checks.normal(generator, shape, dtype)
        if weight == "none":
            return (x,)
        return x, checks.normal(generator, shape[-1:], dtype if weight == "same" else torch.float32)

    def ours(x: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        return rms_norm_package.rms_norm(x, w, eps, offset=offset, order=order, implementation=implementation)

    def theirs(x: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        return package.reference.rms_norm(x, w, eps, offset, order)

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs)


# every branch of the kernels: (order, offset, weight, dtype)
VARIANTS = (
    ("cast_then_mul", 0.0, "same", torch.bfloat16),
    ("mul_then_cast", 1.0, "same", torch.bfloat16),
    ("cast_then_mul", 1.0, "float32", torch.bfloat16),
    ("mul_then_cast", 0.0, "same", torch.float32),
    ("cast_then_mul", 0.0, "same", torch.float32),
    ("cast_then_mul", 0.0, "none", torch.float16),
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("order", package.ORDERS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_option(implementation: str, dtype: torch.dtype, order: str, offset: float, weight: str) -> None:
    checks.check_shape(operation(implementation, order, offset, weight), dtype, (5, 100))
    checks.check_rounding(operation(implementation, order, offset, weight), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(implementation: str, shape: tuple[int, ...]) -> None:
    for order, offset, weight, dtype in VARIANTS:
        checks.check_shape(operation(implementation, order, offset, weight), dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_one_element(implementation: str) -> None:
    # eps of the size of x: otherwise the gradient is the difference of two equal numbers, and its error is chance
    checks.check_shape(operation(implementation, eps=1.0), torch.float32, (5, 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("check", checks.PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_properties(implementation: str, check: checks.Check, variant: tuple[str, float, str, torch.dtype]) -> None:
    order, offset, weight, dtype = variant
    check(operation(implementation, order, offset, weight), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(2, 1100)),
    variant=st.sampled_from(VARIANTS),
    eps=st.sampled_from((1e-6, 1e-5, 1e-3)),
)
def test_drawn_shapes(
    implementation: str, shape: tuple[int, ...], variant: tuple[str, float, str, torch.dtype], eps: float
) -> None:
    order, offset, weight, dtype = variant
    checks.check_shape(operation(implementation, order, offset, weight, eps), dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("weight", ["same", "none"])
def test_registered(implementation: str, weight: str) -> None:
    one = operation(implementation, weight=weight)
    checks.check_compiled(one)
    x, w = (*one.draw((3, 20), torch.float32), None)[:2]
    checks.check_registered("rms_norm", x, w, 1e-6, 0.0, "cast_then_mul", implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_functorch_is_refused(implementation: str) -> None:
    checks.check_functorch(operation(implementation))


def test_bad_input_is_refused_with_a_sentence() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), expected \(8,\)"):
        package.rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match="order 'cast' is unknown"):
        package.rms_norm(x, torch.ones(8), 1e-6, order="cast")
    with pytest.raises(ValueError, match="Did you mean 'triton'"):
        package.rms_norm(x, torch.ones(8), 1e-6, implementation="tritn")
    with pytest.raises(ValueError, match="float64"):
        package.rms_norm(x.double(), None, 1e-6, implementation="triton")


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.zeros(2**19 + 3, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(4096, device="cuda")
    last = x[-1:].clone().requires_grad_()
    x.requires_grad_()
    y = package.rms_norm(x, None, 1e-6, implementation="triton")
    expected = package.rms_norm(last, None, 1e-6, implementation="triton")
    assert torch.equal(y[-1:], expected)
    (grad,) = torch.autograd.grad(y, x, y)
    assert torch.equal(grad[-1:], torch.autograd.grad(expected, last, expected)[0])


def check_sum_of_partials() -> None:
    """More partial sums than one tile holds, and columns that fill none."""
    fused = importlib.import_module("automodel_accel.kernels.rms_norm.fused")
    partial_PH = torch.randint(
        -9, 10, (2 * fused.PARTIALS + 3, 100), generator=torch.Generator().manual_seed(0)
    ).float()
    assert torch.equal(fused.sum_partials(partial_PH, torch.float32), partial_PH.sum(0))
    assert torch.equal(fused.sum_partials(partial_PH[:0], torch.bfloat16), torch.zeros(100, dtype=torch.bfloat16))


def check_package(implementation: str, rms_norm_package: ModuleType) -> None:
    """What a mutant must not survive: every branch, several rows a program, and every property once."""
    operations = [
        (operation(implementation, order, offset, weight, rms_norm_package=rms_norm_package), dtype)
        for order, offset, weight, dtype in VARIANTS
    ]
    if implementation == "triton":
        check_sum_of_partials()
    for one, dtype in operations:
        checks.check_shape(one, dtype, (7, 100))
        checks.check_rounding(one, dtype)
    for one, dtype in operations[2:4]:
        checks.check_everything(one, dtype, [(0, 8)])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    implementation = "torch" if "eager" in mutant.file else "triton"
    check_caught(mutant, partial(check_package, implementation), tmp_path)


@pytest.mark.parametrize("file", ["fused.py", "eager.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"rms_norm/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as rms_norm_package:
        check_package("torch" if file == "eager.py" else "triton", rms_norm_package)
