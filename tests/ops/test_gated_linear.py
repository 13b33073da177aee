"""gated_linear against its definition: values, gradients, properties, and mistakes that must be caught."""

from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_accel.kernels import gated_linear as package
from tests.ops import checks
from tests.ops.mutants_gated_linear import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated

IMPLEMENTATIONS = ("triton", "torch")
FORMS = ("two", *package.LAYOUTS)  # two tensors, or one packed in either layout


def operation(
    implementation: str, activation: str = "silu", form: str = "two", gated_package: ModuleType = package
) -> checks.Operation:
    """gated_linear with its options fixed."""
    layout = "gate_up" if form == "two" else form

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        if form == "two":
            return checks.normal(generator, shape, dtype), checks.normal(generator, shape, dtype)
        return (checks.normal(generator, (*shape[:-1], 2 * shape[-1]), dtype),)

    def ours(*gate_up: torch.Tensor) -> torch.Tensor:
        return gated_package.gated_linear(*gate_up, activation=activation, layout=layout, implementation=implementation)

    def theirs(*gate_up: torch.Tensor) -> torch.Tensor:
        return package.reference.gated_linear(*gate_up, activation=activation, layout=layout)

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs, activations=2 if form == "two" else 1)


# every branch of the kernels: (activation, form, dtype)
VARIANTS = (
    ("silu", "two", torch.bfloat16),
    ("gelu", "gate_up", torch.bfloat16),
    ("gelu_tanh", "up_gate", torch.float32),
    ("silu", "gate_up", torch.float32),
    ("gelu", "two", torch.float32),
    ("gelu_tanh", "two", torch.float16),
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("activation", package.ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_option(implementation: str, dtype: torch.dtype, activation: str, form: str) -> None:
    checks.check_shape(operation(implementation, activation, form), dtype, (5, 100))
    checks.check_rounding(operation(implementation, activation, form), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [*checks.SHAPES, (2, 1024), (2, 1100)], ids=str)
def test_shapes(implementation: str, shape: tuple[int, ...]) -> None:
    for activation, form, dtype in VARIANTS:
        checks.check_shape(operation(implementation, activation, form), dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("check", checks.PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_properties(implementation: str, check: checks.Check, variant: tuple[str, str, torch.dtype]) -> None:
    activation, form, dtype = variant
    check(operation(implementation, activation, form), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 1100)),
    variant=st.sampled_from(VARIANTS),
)
def test_drawn_shapes(implementation: str, shape: tuple[int, ...], variant: tuple[str, str, torch.dtype]) -> None:
    activation, form, dtype = variant
    checks.check_shape(operation(implementation, activation, form), dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS[:2])
def test_registered(implementation: str, form: str) -> None:
    one = operation(implementation, form=form)
    checks.check_compiled(one)
    gate, up = (*one.draw((3, 20), torch.float32), None)[:2]
    checks.check_registered("gated_linear", gate, up, "silu", "gate_up", implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_functorch_is_refused(implementation: str) -> None:
    checks.check_functorch(operation(implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_views_of_one_projection(implementation: str) -> None:
    both = operation(implementation).draw((4, 6, 2 * 48), torch.bfloat16)[0]
    assert both is not None
    for layout in package.LAYOUTS:
        gate, up = package.reference.split(both, layout)
        packed = package.gated_linear(both, layout=layout, implementation=implementation)
        assert torch.equal(packed, package.gated_linear(gate, up, implementation=implementation))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_but_the_inputs_is_saved_for_backward(form: str) -> None:
    saved: set[int] = set()

    def note(x: torch.Tensor) -> torch.Tensor:
        saved.add(x.data_ptr())
        return x

    inputs = [x.requires_grad_() for x in operation("torch", form=form).draw((4, 16), torch.float32) if x is not None]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        operation("torch", form=form).ours(*inputs)
    assert saved == {x.data_ptr() for x in inputs}


def test_bad_input_is_refused_with_a_sentence() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"up is \(2, 7\) torch.float32, gate is \(2, 8\) torch.float32"):
        package.gated_linear(x, torch.ones(2, 7))
    with pytest.raises(ValueError, match="expected the same shape and dtype"):
        package.gated_linear(x, x.bfloat16())
    with pytest.raises(ValueError, match=r"\(2, 7\) cannot be halved"):
        package.gated_linear(torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"unknown activation 'gelu_tan'. Did you mean 'gelu_tanh'"):
        package.gated_linear(x, activation="gelu_tan")
    with pytest.raises(ValueError, match=r"unknown layout 'gate-up'. Did you mean 'gate_up'"):
        package.gated_linear(x, layout="gate-up")
    with pytest.raises(ValueError, match="Did you mean 'torch'"):
        package.gated_linear(x, implementation="tourch")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("form", ["contiguous", "strided"])
def test_more_than_two_to_the_31_elements(form: str) -> None:
    rows, width = 2**18 + 3, 8192
    gate = torch.zeros(rows, width + 64, dtype=torch.bfloat16, device="cuda")[:, : width if form == "strided" else None]
    gate[-1] = torch.randn(gate.shape[1], device="cuda")
    last = gate[-1:].clone().requires_grad_()
    gate.requires_grad_()
    y = package.gated_linear(gate, gate, implementation="triton")
    expected = package.gated_linear(last, last, implementation="triton")
    assert torch.equal(y[-1:], expected)
    (grad,) = torch.autograd.grad(y, gate, y)
    assert torch.equal(grad[-1:], torch.autograd.grad(expected, last, expected)[0])


def check_package(implementation: str, gated_package: ModuleType) -> None:
    """What a mutant must not survive: every branch, rows of several tiles, and every property once."""
    operations = [
        (operation(implementation, activation, form, gated_package), dtype) for activation, form, dtype in VARIANTS
    ]
    for one, dtype in operations:
        checks.check_shape(one, dtype, (3, 100))
        checks.check_rounding(one, dtype)
    for one, dtype in (operations[0], operations[3]):
        checks.check_everything(one, dtype, [(0, 8), (3, 1100)])
    for one, dtype in operations:
        checks.check_magnitudes(one, dtype)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    implementation = "torch" if "eager" in mutant.file else "triton"
    check_caught(mutant, partial(check_package, implementation), tmp_path)


@pytest.mark.parametrize("file", ["fused.py", "eager.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"gated_linear/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as gated_package:
        check_package("torch" if file == "eager.py" else "triton", gated_package)
