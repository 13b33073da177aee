"""gated_rms_norm against its definition: values, gradients, properties, and mistakes that must be caught."""

import itertools
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_accel.kernels import gated_norm as package
from tests.ops import checks
from tests.ops.mutants_gated_norm import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated

IMPLEMENTATIONS = package.KERNEL.names()
WEIGHTS = ("same", "float32", "none")  # dtype of the weight
SHAPES = [shape for shape in checks.SHAPES if shape[-1] > 1]


def operation(
    implementation: str,
    activation: str = "silu",
    gate_first: bool = False,
    order: str = "cast_then_mul",
    weight: str = "same",
    eps: float = 1e-6,
    gated_norm_package: ModuleType = package,
) -> checks.Operation:
    """gated_rms_norm with its options fixed."""

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        x, gate = (checks.normal(generator, shape, dtype) for _ in range(2))
        if weight == "none":
            return x, gate
        return x, gate, checks.normal(generator, shape[-1:], dtype if weight == "same" else torch.float32)

    def ours(x: torch.Tensor, gate: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        options = {"activation": activation, "gate_first": gate_first, "order": order}
        return gated_norm_package.gated_rms_norm(x, gate, w, eps, **options, implementation=implementation)

    def theirs(x: torch.Tensor, gate: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        return package.reference.gated_rms_norm(x, gate, w, eps, activation, gate_first, order)

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs, activations=2)


# every branch of the kernels: (activation, gate first, order, weight, dtype)
VARIANTS = (
    ("silu", False, "cast_then_mul", "same", torch.bfloat16),
    ("silu", True, "cast_then_mul", "same", torch.bfloat16),
    ("sigmoid", False, "mul_then_cast", "same", torch.bfloat16),
    ("sigmoid", True, "cast_then_mul", "float32", torch.bfloat16),
    ("silu", False, "cast_then_mul", "float32", torch.float16),
    ("silu", False, "cast_then_mul", "same", torch.float32),
    ("silu", True, "mul_then_cast", "same", torch.float32),
    ("silu", False, "cast_then_mul", "none", torch.float16),
)
Variant = tuple[str, bool, str, str, torch.dtype]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("order", package.ORDERS)
def test_every_option(implementation: str, dtype: torch.dtype, weight: str, order: str) -> None:
    for activation, gate_first in itertools.product(package.ACTIVATIONS, (False, True)):
        one = operation(implementation, activation, gate_first, order, weight)
        checks.check_shape(one, dtype, (5, 100))
        checks.check_rounding(one, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(implementation: str, shape: tuple[int, ...]) -> None:
    for *options, dtype in VARIANTS:
        checks.check_shape(operation(implementation, *options), dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("check", checks.PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_properties(implementation: str, check: checks.Check, variant: Variant) -> None:
    *options, dtype = variant
    check(operation(implementation, *options), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=12, derandomize=True, deadline=None, database=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(2, 1100)),
    variant=st.sampled_from(VARIANTS),
    eps=st.sampled_from((1e-6, 1e-5, 1e-3)),
)
def test_drawn_shapes(implementation: str, shape: tuple[int, ...], variant: Variant, eps: float) -> None:
    *options, dtype = variant
    checks.check_shape(operation(implementation, *options, eps), dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("weight", ["same", "none"])
@pytest.mark.parametrize("gate_first", [True, False])
def test_registered(implementation: str, weight: str, gate_first: bool) -> None:
    one = operation(implementation, gate_first=gate_first, weight=weight)
    checks.check_compiled(one)
    x, gate, w = (*one.draw((3, 20), torch.float32), None)[:3]
    options = ("silu", gate_first, "cast_then_mul", implementation)
    checks.check_registered("gated_rms_norm", x, gate, w, 1e-6, *options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_functorch_is_refused(implementation: str) -> None:
    checks.check_functorch(operation(implementation))


def test_bad_input_is_refused_with_a_sentence() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), expected \(8,\)"):
        package.gated_rms_norm(x, x, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match=r"gate is \(1, 8\) torch.float32, expected \(2, 8\) torch.float32 as x"):
        package.gated_rms_norm(x, x[:1], None, 1e-6)
    with pytest.raises(ValueError, match=r"gate is \(2, 8\) torch.bfloat16, expected \(2, 8\) torch.float32 as x"):
        package.gated_rms_norm(x, x.bfloat16(), None, 1e-6)
    with pytest.raises(ValueError, match="order 'cast' with activation 'silu' is unknown"):
        package.gated_rms_norm(x, x, None, 1e-6, order="cast")
    with pytest.raises(ValueError, match="with activation 'tanh' is unknown"):
        package.gated_rms_norm(x, x, None, 1e-6, activation="tanh")
    with pytest.raises(ValueError, match="Did you mean 'triton'"):
        package.gated_rms_norm(x, x, None, 1e-6, implementation="tritn")


def check_package(implementation: str, gated_norm_package: ModuleType) -> None:
    """What a mutant must not survive: every branch, several rows a program, and every property once."""
    operations = [
        (operation(implementation, *options, gated_norm_package=gated_norm_package), dtype)
        for *options, dtype in VARIANTS
    ]
    for one, dtype in operations:
        checks.check_shape(one, dtype, (7, 100))
        checks.check_rounding(one, dtype)
    for one, dtype in operations[5:7]:
        checks.check_everything(one, dtype, [(0, 8)])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    implementation = "torch" if "eager" in mutant.file else "triton"
    check_caught(mutant, partial(check_package, implementation), tmp_path)


@pytest.mark.parametrize("file", ["fused.py", "eager.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"gated_norm/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as gated_norm_package:
        check_package("torch" if file == "eager.py" else "triton", gated_norm_package)
