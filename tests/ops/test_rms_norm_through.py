"""rms_norm_through against its definition: both outputs, gradients of each and of both, and mistakes that must be caught."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from automodel_accel.kernels import rms_norm as package
from automodel_accel.kernels.rms_norm.reference import rms_norm as reference
from tests.ops import checks
from tests.ops.mutation import Mutant, check_caught

THROUGH = "rms_norm/through.py"
MUTANTS = (
    Mutant(THROUGH, "*(grad_y, grad_h, x, weight,", "*(grad_y, grad_y, x, weight,", "the norm's gradient for both"),
    Mutant(THROUGH, "if grad_h is None:", "if True:", "the gradient of what was handed on is lost"),
    Mutant(
        THROUGH,
        "return grad_h, None, None, None, None, None",
        "return None, None, None, None, None, None",
        "lost alone",
    ),
    Mutant(THROUGH, "return y, x.view_as(x)", "return y, y.view_as(x)", "the norm is handed on in place of its input"),
    Mutant(
        THROUGH,
        "return grad_x, grad_weight if needs_grad_weight",
        "return grad_x, grad_weight * 2 if needs_grad_weight",
        "twice",
    ),
)
# which of (y, h) the loss depends on
USED = {"both": (1.0, 1.0), "the norm alone": (1.0, 0.0), "the input alone": (0.0, 1.0)}


def operation(used: str, order: str = "cast_then_mul", implementation: str = "torch") -> checks.Operation:
    """What is used of the two outputs, in a row."""
    wanted = [number for number, share in enumerate(USED[used]) if share]

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        return checks.normal(generator, shape, dtype), checks.normal(generator, shape[-1:], dtype)

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        through = importlib.import_module("automodel_accel.kernels.rms_norm.through").rms_norm_through
        outputs = through(x * 1, weight, 1e-6, order=order, implementation=implementation)
        return torch.cat([outputs[number].flatten() for number in wanted])

    def theirs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        outputs = reference(x, weight, 1e-6, 0.0, order), x
        return torch.cat([outputs[number].flatten() for number in wanted])

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs)


@pytest.mark.parametrize("implementation", package.ADD_KERNEL.names())
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("order", package.ORDERS)
def test_both_outputs(implementation: str, dtype: torch.dtype, order: str) -> None:
    for shape in ((2, 4, 64), (3, 7), (5, 63), (2, 1000), (0, 8), (9,)):
        checks.check_shape(operation("both", order, implementation), dtype, shape)


def check_each_use(rms_norm_package: ModuleType) -> None:
    """Gradients of both outputs, and of each alone."""
    checks.check_shape(operation("both"), torch.float32, (3, 7))
    checks.check_shape(operation("the norm alone"), torch.float32, (3, 7))
    x = torch.randn(3, 7, requires_grad=True)
    weight = torch.randn(7, requires_grad=True)
    through = importlib.import_module("automodel_accel.kernels.rms_norm.through").rms_norm_through
    _, h = through(x, weight, 1e-6)
    found = torch.autograd.grad(h.sum(), [x, weight], allow_unused=True)
    assert found[0] is not None
    assert torch.equal(found[0], torch.ones_like(x))
    assert found[1] is None


def test_each_use() -> None:
    check_each_use(package)


def test_it_saves_what_the_norm_saves_and_hands_on_the_input_itself() -> None:
    through = importlib.import_module("automodel_accel.kernels.rms_norm.through").rms_norm_through
    x, weight = torch.randn(3, 7, requires_grad=True), torch.randn(7, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        _, h = through(x, weight, 1e-6)
    assert h.data_ptr() == x.data_ptr()
    assert [tensor.numel() for tensor in kept] == [x.numel(), weight.numel(), 3]


def test_a_second_derivative_raises() -> None:
    through = importlib.import_module("automodel_accel.kernels.rms_norm.through").rms_norm_through
    x = torch.randn(3, 7, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(through(x, None, 1e-6)[0].sum(), x, create_graph=True)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.why)
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    check_caught(mutant, check_each_use, tmp_path)
