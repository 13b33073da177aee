"""add_rms_norm against its definition: both outputs, every gradient, properties, and mistakes that must be caught."""

import dataclasses
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_accel.kernels import rms_norm as package
from tests.ops import checks
from tests.ops.mutants_add_rms_norm import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated

IMPLEMENTATIONS = package.ADD_KERNEL.names()
SHAPES = [shape for shape in checks.SHAPES if shape[-1] > 1]


@dataclasses.dataclass(frozen=True)
class Variant:
    """The options of one call; `weight` and `residual` are "same" (dtype as x), "float32" or, for the weight, "none"."""

    dtype: torch.dtype
    order: str = "cast_then_mul"
    offset: float = 0.0
    weight: str = "same"
    residual: str = "same"
    scale: float = 1.0
    eps: float = 1e-6
    outputs: str = "yh"

    def __str__(self) -> str:
        return ",".join(str(value) for value in dataclasses.astuple(self))


def operation(implementation: str, variant: Variant, rms_norm_package: ModuleType = package) -> checks.Operation:
    """add_rms_norm with its options fixed; its outputs side by side."""

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        x = checks.normal(generator, shape, dtype)
        residual = checks.normal(generator, shape, dtype if variant.residual == "same" else torch.float32)
        if variant.weight == "none":
            return x, residual
        return x, residual, checks.normal(generator, shape[-1:], dtype if variant.weight == "same" else torch.float32)

    def chosen(y: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        # side by side: the norm's gradient arrives with strides of its own, the sum's in one block
        return torch.cat([{"y": y, "h": h * 1}[name] for name in variant.outputs], -1)

    def ours(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        options = {"offset": variant.offset, "order": variant.order, "scale": variant.scale}
        return chosen(
            *rms_norm_package.add_rms_norm(x, residual, w, variant.eps, **options, implementation=implementation)
        )

    def theirs(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        options = (variant.eps, variant.offset, variant.order, variant.scale)
        return chosen(*package.reference.add_rms_norm(x, residual, w, *options))

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs, activations=2)


def check_rounding(one: checks.Operation, variant: Variant) -> None:
    """Where the sum is rounded at all: next to a float32 residual it is not."""
    if variant.residual == "same":
        checks.check_rounding(one, variant.dtype)


# every branch of the kernels
VARIANTS = (
    Variant(torch.bfloat16),
    Variant(torch.bfloat16, "mul_then_cast", 1.0, scale=0.22),
    Variant(torch.bfloat16, "cast_then_mul", 1.0, "float32"),
    Variant(torch.bfloat16, "cast_then_mul", residual="float32", weight="float32"),
    Variant(torch.float32, "mul_then_cast"),
    Variant(torch.float32, scale=-1.7),
    Variant(torch.float16, weight="none"),
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("order", package.ORDERS)
@pytest.mark.parametrize("weight", ["same", "float32", "none"])
@pytest.mark.parametrize("residual", ["same", "float32"])
def test_every_option(implementation: str, dtype: torch.dtype, order: str, weight: str, residual: str) -> None:
    for offset, scale in ((0.0, 1.0), (1.0, 0.22)):
        variant = Variant(dtype, order, offset, weight, residual, scale)
        one = operation(implementation, variant)
        checks.check_shape(one, dtype, (5, 100))
        check_rounding(one, variant)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(implementation: str, shape: tuple[int, ...]) -> None:
    for variant in VARIANTS:
        checks.check_shape(operation(implementation, variant), variant.dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_one_element(implementation: str) -> None:
    # eps of the size of h: otherwise the gradient is the difference of two equal numbers, and its error is chance
    checks.check_shape(operation(implementation, Variant(torch.float32, eps=1.0)), torch.float32, (5, 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("check", checks.PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_properties(implementation: str, check: checks.Check, variant: Variant) -> None:
    if check is checks.check_nothing_overwritten and variant.scale == 1.0 and variant.residual == "same":
        variant = dataclasses.replace(variant, scale=2.0)  # with 1, x and the residual share one gradient, as in torch
    if check is checks.check_rounding:
        check_rounding(operation(implementation, variant), variant)
    else:
        check(operation(implementation, variant), variant.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("outputs", ["y", "h"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_one_output_used(implementation: str, outputs: str, variant: Variant) -> None:
    """Where only the norm, or only the sum, goes on, the other's gradient is absent."""
    one = operation(implementation, dataclasses.replace(variant, outputs=outputs))
    inputs = one.draw((5, 100), variant.dtype)
    checks.check_values(one, inputs, wanted=range(len(inputs)) if outputs == "y" else (0, 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_sum_is_the_models_own_to_the_bit(implementation: str) -> None:
    for variant in VARIANTS:
        one = operation(implementation, dataclasses.replace(variant, outputs="h"))
        inputs = one.draw((7, 100), variant.dtype)
        assert torch.equal(one.ours(*inputs), one.theirs(*inputs)), variant


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_tensor_as_branch_and_residual(implementation: str) -> None:
    def twice(function: checks.Callable[..., torch.Tensor]) -> checks.Callable[..., torch.Tensor]:
        return lambda x, w: function(x, x, w)

    one = operation(implementation, Variant(torch.float32, scale=0.5))
    doubled = checks.Operation(
        ours=twice(one.ours),
        theirs=twice(one.theirs),
        inputs=lambda generator, shape, dtype: one.inputs(generator, shape, dtype)[1:],
    )
    checks.check_shape(doubled, torch.float32, (5, 100))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_accumulate_apart(implementation: str) -> None:
    """x and the residual share one gradient tensor; the .grad of two leaves must not."""
    x, residual = (torch.randn(3, 8, device=checks.DEVICE, requires_grad=True) for _ in range(2))
    for _ in range(2):
        y, h = package.add_rms_norm(x, residual, None, 1e-6, implementation=implementation)
        (y + h).sum().backward()
    assert x.grad is not None
    assert residual.grad is not None
    torch.testing.assert_close(x.grad, residual.grad)
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)


def check_incoming_gradients_stay(implementation: str, rms_norm_package: ModuleType) -> None:
    """Neither output's gradient is written to: it may be used elsewhere."""
    x, residual = (torch.randn(3, 8, device=checks.DEVICE, requires_grad=True) for _ in range(2))
    y, h = rms_norm_package.add_rms_norm(x, residual, None, 1e-6, scale=0.5, implementation=implementation)
    incoming = [torch.randn_like(y), torch.randn_like(h)]
    before = [gradient.clone() for gradient in incoming]
    torch.autograd.grad((y, h), (x, residual), incoming)
    assert all(map(torch.equal, incoming, before))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_incoming_gradients_stay(implementation: str) -> None:
    check_incoming_gradients_stay(implementation, package)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(2, 1100)),
    variant=st.sampled_from(VARIANTS),
    eps=st.sampled_from((1e-6, 1e-5, 1e-3)),
)
def test_drawn_shapes(implementation: str, shape: tuple[int, ...], variant: Variant, eps: float) -> None:
    checks.check_shape(operation(implementation, dataclasses.replace(variant, eps=eps)), variant.dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("weight", ["same", "none"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_registered(implementation: str, weight: str, scale: float) -> None:
    one = operation(implementation, Variant(torch.float32, weight=weight, scale=scale))
    checks.check_compiled(one)
    x, residual, w = (*one.draw((3, 20), torch.float32), None)[:3]
    checks.check_registered("add_rms_norm", x, residual, w, 1e-6, 0.0, "cast_then_mul", scale, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_functorch_is_refused(implementation: str) -> None:
    checks.check_functorch(operation(implementation, Variant(torch.float32)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_saved_for_backward_are_the_sum_and_one_number_a_row(implementation: str) -> None:
    x, residual = (torch.randn(16, 256, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.ones(256, dtype=torch.bfloat16, requires_grad=True)
    saved: list[tuple[torch.Size, torch.dtype]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append((tensor.shape, tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        package.add_rms_norm(x, residual, weight, 1e-6, implementation=implementation)
    rows = (torch.Size([16, 256]), torch.bfloat16), (torch.Size([256]), torch.bfloat16)
    assert saved == [*rows, (torch.Size([16]), torch.float32)]


def test_bad_input_is_refused_with_a_sentence() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"x has shape \(2, 8\), residual \(8,\); expected the same"):
        package.add_rms_norm(x, x[0], torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), expected \(8,\)"):
        package.add_rms_norm(x, x, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match="order 'cast' is unknown"):
        package.add_rms_norm(x, x, torch.ones(8), 1e-6, order="cast")
    with pytest.raises(ValueError, match="Did you mean 'triton'"):
        package.add_rms_norm(x, x, torch.ones(8), 1e-6, implementation="tritn")
    with pytest.raises(ValueError, match="float64"):
        package.add_rms_norm(x, x.double(), None, 1e-6, implementation="triton")


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.zeros(2**19 + 3, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(4096, device="cuda")
    last = x[-1:].clone().requires_grad_()
    x.requires_grad_()
    y, h = package.add_rms_norm(x, x.detach(), None, 1e-6, implementation="triton")
    expected = package.add_rms_norm(last, last.detach(), None, 1e-6, implementation="triton")
    assert torch.equal(y[-1:], expected[0])
    assert torch.equal(h[-1:], expected[1])
    (grad,) = torch.autograd.grad((y, h), x, (y, h))
    assert torch.equal(grad[-1:], torch.autograd.grad(expected, last, expected)[0])


def check_package(implementation: str, rms_norm_package: ModuleType) -> None:
    """What a mutant must not survive: every branch, several rows a program, and every property once."""
    operations = [(operation(implementation, variant, rms_norm_package), variant) for variant in VARIANTS]
    for one, variant in operations:
        checks.check_shape(one, variant.dtype, (7, 100))
        check_rounding(one, variant)
        only_h = operation(implementation, dataclasses.replace(variant, outputs="h"), rms_norm_package)
        inputs = only_h.draw((7, 100), variant.dtype)
        assert torch.equal(only_h.ours(*inputs), only_h.theirs(*inputs))
        checks.check_values(only_h, inputs, wanted=(0, 1))
        only_y = operation(implementation, dataclasses.replace(variant, outputs="y"), rms_norm_package)
        checks.check_shape(only_y, variant.dtype, (7, 100))
    check_incoming_gradients_stay(implementation, rms_norm_package)
    for one, variant in (operations[1], operations[5]):
        checks.check_everything(one, variant.dtype, [(0, 8)])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    implementation = "torch" if "eager" in mutant.file else "triton"
    check_caught(mutant, partial(check_package, implementation), tmp_path)


@pytest.mark.parametrize("file", ["add_fused.py", "add_eager.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"rms_norm/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as rms_norm_package:
        check_package("torch" if file == "add_eager.py" else "triton", rms_norm_package)
