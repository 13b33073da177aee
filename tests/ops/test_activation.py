"""activation against its definition: values, gradients, properties, and mistakes that must be caught."""

from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_accel.kernels import activation as package
from tests.ops import checks
from tests.ops.mutants_activation import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated

IMPLEMENTATIONS = package.KERNEL.names()
# a model that writes quick_gelu out rounds three times; ours rounds once, and is nearer to the truth
ROUNDED_LIKE_TORCH = tuple(name for name in package.ACTIVATIONS if name != "quick_gelu")
# (implementation, activation) of what is ours, not torch's own operation
OURS = [
    (implementation, name)
    for implementation in IMPLEMENTATIONS
    for name in package.ACTIVATIONS
    if not (implementation == "torch" and name in package.ONE_OPERATION)
]


def operation(
    implementation: str, name: str = "quick_gelu", activation_package: ModuleType = package
) -> checks.Operation:
    """Activation with its options fixed."""

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        return (checks.normal(generator, shape, dtype),)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return activation_package.activation(x, name, implementation=implementation)  # type: ignore[no-any-return]

    return checks.Operation(ours=ours, theirs=partial(package.reference.activation, name=name), inputs=inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("name", package.ACTIVATIONS)
def test_shapes(implementation: str, dtype: torch.dtype, name: str) -> None:
    for shape in (*checks.SHAPES, (2, 1100)):
        checks.check_shape(operation(implementation, name), dtype, shape)


@pytest.mark.parametrize(("implementation", "name"), OURS)
@pytest.mark.parametrize("check", checks.PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_properties(implementation: str, name: str, check: checks.Check, dtype: torch.dtype) -> None:
    if check is not checks.check_rounding or name in ROUNDED_LIKE_TORCH:
        check(operation(implementation, name), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 1100)),
    name=st.sampled_from(package.ACTIVATIONS),
    dtype=st.sampled_from(checks.DTYPES),
)
def test_drawn_shapes(implementation: str, shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    checks.check_shape(operation(implementation, name), dtype, shape)


@pytest.mark.parametrize(("implementation", "name"), OURS)
def test_registered(implementation: str, name: str) -> None:
    one = operation(implementation, name)
    checks.check_compiled(one)
    checks.check_registered("activation", *one.draw((3, 20), torch.float32), name, implementation)
    checks.check_functorch(one)


@pytest.mark.parametrize("name", sorted(package.ONE_OPERATION))
def test_where_torch_has_one_operation_it_is_called(name: str) -> None:
    (x,) = operation("torch", name).draw((3, 20), torch.float32)
    assert x is not None
    x.requires_grad_()
    y = package.activation(x, name, implementation="torch")
    assert type(y.grad_fn) is type(package.reference.activation(x, name).grad_fn)
    torch.testing.assert_close(package.activation(x, name), y)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", package.ACTIVATIONS)
def test_one_tensor_is_saved_for_backward(implementation: str, name: str) -> None:
    """The input; for relu the output, which whatever comes next keeps too."""
    saved: set[int] = set()

    def note(x: torch.Tensor) -> torch.Tensor:
        saved.add(x.data_ptr())
        return x

    (x,) = operation(implementation, name).draw((4, 16), torch.float32)
    assert x is not None
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        y = operation(implementation, name).ours(x)
    assert saved == {(y if name == "relu" else x).data_ptr()}


def test_float16_beyond_the_range_of_the_scaled_input() -> None:
    """1.702 x overflows where x does not; the slope there is one."""
    x = torch.tensor([60000.0, -60000.0, 1.0], dtype=torch.float16)
    for implementation in IMPLEMENTATIONS:
        checks.check_values(operation(implementation), (x,))


def test_bad_input_is_refused_with_a_sentence() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"unknown activation 'gelu_tan'. Did you mean 'gelu_tanh'"):
        package.activation(x, "gelu_tan")
    with pytest.raises(ValueError, match="Did you mean 'torch'"):
        package.activation(x, "relu2", implementation="tourch")
    with pytest.raises(ValueError, match=r"computes .*the tensors are torch.int64"):
        package.activation(x.long(), "relu2")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("form", ["contiguous", "strided"])
def test_more_than_two_to_the_31_elements(form: str) -> None:
    rows, width = 2**18 + 3, 8192
    x = torch.zeros(rows, width + 64, dtype=torch.bfloat16, device="cuda")[:, : width if form == "strided" else None]
    x[-1] = torch.randn(x.shape[1], device="cuda")
    last = x[-1:].clone().requires_grad_()
    x.requires_grad_()
    y = package.activation(x, "gelu", implementation="triton")
    expected = package.activation(last, "gelu", implementation="triton")
    assert torch.equal(y[-1:], expected)
    (grad,) = torch.autograd.grad(y, x, y)
    assert torch.equal(grad[-1:], torch.autograd.grad(expected, last, expected)[0])


def check_package(implementation: str, activation_package: ModuleType) -> None:
    """What a mutant must not survive: every formula, rows of several tiles, and every property once."""
    for name in package.ACTIVATIONS:
        one = operation(implementation, name, activation_package)
        for dtype in (torch.float32, torch.bfloat16):
            checks.check_shape(one, dtype, (3, 100))
            checks.check_magnitudes(one, dtype)
        checks.check_not_finite(one, torch.float32)
        checks.check_layouts(one, torch.float32)
    checks.check_shape(operation(implementation, "gelu", activation_package), torch.bfloat16, (3, 1100))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    # named, "torch" would be torch's own operation; "auto" takes the same code on a CPU
    implementation = "auto" if "eager" in mutant.file else "triton"
    check_caught(mutant, partial(check_package, implementation), tmp_path)


@pytest.mark.parametrize("file", ["fused.py", "eager.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"activation/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as activation_package:
        check_package("auto" if file == "eager.py" else "triton", activation_package)
