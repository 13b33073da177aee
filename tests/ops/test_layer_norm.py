"""layer_norm and add_layer_norm against their definitions: values, gradients, properties, and mistakes that must be caught."""

import itertools
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_accel.kernels import layer_norm as package
from automodel_accel.kernels.numerics import judge
from tests.ops import checks
from tests.ops.mutants_layer_norm import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated

IMPLEMENTATIONS = ("triton", "torch")
PARAMETERS = ("same", "float32", "weight only", "bias only", "none")
# the gradient of the bias is a plain sum over rows: over 3 columns, luck decides how near to the truth
SHAPES = [(33, 50) if shape == (33, 3) else shape for shape in checks.SHAPES if shape[-1] > 1]


def check_not_finite(operation: checks.Operation, dtype: torch.dtype) -> None:
    """One NaN or infinity spoils what it spoils in torch, and nothing else; whether it is NaN or infinite there is chance."""
    inputs = operation.draw((4, 50), dtype)
    for value, index in itertools.product((float("nan"), float("inf")), checks.floating(inputs)):
        poisoned = [None if x is None else x.clone() for x in inputs]
        poisoned[index].view(-1)[inputs[index].numel() // 2] = value  # type: ignore[union-attr]
        results = checks.results(operation, tuple(poisoned))
        spoilt = [~result.truth.isfinite() for result in results]
        for result, at in zip(results, spoilt, strict=True):
            assert torch.equal(~result.ours.isfinite(), at), f"{result.name} with {value} in input {index}"
        finite = [
            result._replace(ours=result.ours[~at], theirs=result.theirs[~at], truth=result.truth[~at])
            for result, at in zip(results, spoilt, strict=True)
        ]
        checks.judge_results([finite])


PROPERTIES = tuple(check_not_finite if check is checks.check_not_finite else check for check in checks.PROPERTIES)
# alone, "torch" is torch's own operation and can do more than a kernel; test_torch_alone_is_torch holds it
MORE_THAN_A_KERNEL = (checks.check_double_backward,)


def parameters(generator: torch.Generator, size: int, dtype: torch.dtype, which: str) -> checks.Tensors:
    dtype = torch.float32 if which == "float32" else dtype
    weight, bias = (checks.normal(generator, (size,), dtype) for _ in range(2))
    return None if which in ("bias only", "none") else weight, None if which in ("weight only", "none") else bias


def operation(
    implementation: str,
    which: str = "same",
    offset: float = 0.0,
    eps: float = 1e-6,
    layer_norm_package: ModuleType = package,
) -> checks.Operation:
    """layer_norm with its options fixed."""

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        return checks.normal(generator, shape, dtype), *parameters(generator, shape[-1], dtype, which)

    def ours(x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
        return layer_norm_package.layer_norm(x, w, b, eps, offset=offset, implementation=implementation)

    def theirs(x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
        return package.reference.layer_norm(x, w, b, eps, offset)

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs)


class _Apart(torch.autograd.Function):
    """The same tensor, whose gradient has memory of its own: a sum hands one gradient to both of its inputs, as torch's does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.clone()


def _apart(x: torch.Tensor) -> torch.Tensor:
    return _Apart.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def both(outputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """y beside h."""
    return torch.cat(outputs, -1)


def addition(
    implementation: str,
    which: str = "same",
    scale: float = 1.0,
    residual: torch.dtype | None = None,
    offset: float = 0.0,
    eps: float = 1e-6,
    layer_norm_package: ModuleType = package,
) -> checks.Operation:
    """add_layer_norm with its options fixed; both outputs count."""

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        added = checks.normal(generator, shape, dtype), checks.normal(generator, shape, residual or dtype)
        return *added, *parameters(generator, shape[-1], dtype, which)

    def ours(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
        options = {"scale": scale, "offset": offset, "implementation": implementation}
        return both(layer_norm_package.add_layer_norm(_apart(x), _apart(r), w, b, eps, **options))

    def theirs(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
        return both(package.reference.add_layer_norm(x, r, w, b, eps, scale, offset))

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs, activations=2)


# every branch of the kernels: (parameters, offset, dtype)
VARIANTS = (
    ("same", 0.0, torch.bfloat16),
    ("same", 1.0, torch.bfloat16),
    ("float32", 1.0, torch.bfloat16),
    ("same", 0.0, torch.float32),
    ("weight only", 0.0, torch.float32),
    ("bias only", 0.0, torch.float16),
    ("none", 0.0, torch.float16),
)
# (parameters, scale, dtype of the residual, offset, dtype)
ADDITIONS = (
    ("same", 1.0, None, 0.0, torch.bfloat16),
    ("same", 0.22, None, 1.0, torch.bfloat16),
    ("float32", 1.0, torch.float32, 0.0, torch.bfloat16),
    ("same", 0.22, None, 0.0, torch.float32),
    ("weight only", 1.0, None, 0.0, torch.float16),
    ("none", 1.0, torch.bfloat16, 0.0, torch.float32),
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("which", PARAMETERS)
def test_every_option(implementation: str, dtype: torch.dtype, which: str) -> None:
    for offset in (0.0, 1.0):
        checks.check_shape(operation(implementation, which, offset), dtype, (5, 100))
        checks.check_rounding(operation(implementation, which, offset), dtype)
    for scale, residual in itertools.product((1.0, 0.22), (None, torch.float32, torch.bfloat16)):
        checks.check_shape(addition(implementation, which, scale, residual), dtype, (5, 100))
        if torch.promote_types(dtype, residual or dtype) == dtype:
            checks.check_rounding(addition(implementation, which, scale, residual), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(implementation: str, shape: tuple[int, ...]) -> None:
    for which, offset, dtype in VARIANTS:
        checks.check_shape(operation(implementation, which, offset), dtype, shape)
    for *options, dtype in ADDITIONS:
        checks.check_shape(addition(implementation, *options), dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_one_element(implementation: str) -> None:
    """The bias, and no gradient for x."""
    x, w, b = (value.requires_grad_() for value in (torch.randn(5, 1), torch.randn(1), torch.randn(1)))
    y = package.layer_norm(x, w, b, 1e-6, implementation=implementation)
    assert torch.equal(y, b.expand(5, 1))
    assert not torch.autograd.grad(y.sum(), x)[0].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_properties(implementation: str, check: checks.Check, variant: tuple[str, float, torch.dtype]) -> None:
    which, offset, dtype = variant
    if implementation == "torch" and check in MORE_THAN_A_KERNEL:
        pytest.skip("torch's own operation can")
    check(operation(implementation, which, offset), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", ADDITIONS, ids=str)
def test_properties_of_the_addition(
    implementation: str,
    check: checks.Check,
    variant: tuple[str, float, torch.dtype | None, float, torch.dtype],
) -> None:
    *options, dtype = variant
    if check is checks.check_rounding and variant[2] == torch.float32:
        pytest.skip("the output is float32")
    check(addition(implementation, *options), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=12, derandomize=True, deadline=None, database=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(8, 1100)),
    variant=st.sampled_from(VARIANTS),
    addition_variant=st.sampled_from(ADDITIONS),
    eps=st.sampled_from((1e-6, 1e-5, 1e-3)),
)
def test_drawn_shapes(
    implementation: str,
    shape: tuple[int, ...],
    variant: tuple[str, float, torch.dtype],
    addition_variant: tuple[str, float, torch.dtype | None, float, torch.dtype],
    eps: float,
) -> None:
    which, offset, dtype = variant
    checks.check_shape(operation(implementation, which, offset, eps), dtype, shape)
    *options, dtype = addition_variant
    checks.check_shape(addition(implementation, *options, eps), dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("used", ["y", "h"])
def test_one_output_of_the_addition_is_used(implementation: str, scale: float, dtype: torch.dtype, used: str) -> None:
    def pick(outputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return outputs["yh".index(used)]

    one = addition(implementation)
    x, r, w, b = one.draw((7, 100), dtype)
    wanted = (0, 1, 2, 3) if used == "y" else (0, 1)
    picked = checks.Operation(
        ours=lambda *t: pick(package.add_layer_norm(*t, 1e-6, scale=scale, implementation=implementation)),
        theirs=lambda *t: pick(package.reference.add_layer_norm(*t, 1e-6, scale)),
        inputs=one.inputs,
    )
    checks.check_values(picked, (x, r, w, b), wanted=wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_sum_is_the_bits_of_the_models_sum(implementation: str) -> None:
    for (x_dtype, r_dtype), scale in itertools.product(itertools.product(checks.DTYPES, repeat=2), (1.0, 0.22)):
        x, r = torch.randn(9, 100).to(x_dtype), torch.randn(9, 100).to(r_dtype)
        _, h = package.add_layer_norm(x, r, None, None, 1e-6, scale=scale, implementation=implementation)
        expected = r + x * scale
        fused = scale != 1.0 and expected.dtype == torch.float32 and x_dtype == torch.float32  # may be one operation
        assert h.dtype == expected.dtype
        assert torch.equal(h, expected) or (fused and judge(h, expected, r.double() + x.double() * scale).passed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", ["same", "none"])
def test_registered(implementation: str, which: str) -> None:
    checks.check_compiled(operation(implementation, which))
    checks.check_compiled(addition(implementation, which))
    x, r, w, b = addition(implementation, which).draw((3, 20), torch.float32)
    checks.check_registered("layer_norm", x, w, b, 1e-6, 0.0, implementation)
    checks.check_registered("add_layer_norm", x, r, w, b, 1e-6, 0.5, 0.0, implementation)


def test_functorch_is_refused() -> None:
    checks.check_functorch(operation("triton"))


@pytest.mark.parametrize("implementation", ["torch", "auto"])
def test_torch_alone_is_torch(implementation: str) -> None:
    """On a CPU, torch's own operation and gradient, to the second derivative."""
    x, w, b = operation("torch").draw((3, 20), torch.float32)
    y = package.layer_norm(x, w, b, 1e-6, implementation=implementation)
    assert torch.equal(y, F.layer_norm(x, (20,), w, b, 1e-6)) or checks.DEVICE != "cpu"
    double = [value.double().requires_grad_() for value in (x, w, b)]
    assert torch.autograd.gradgradcheck(lambda *t: package.layer_norm(*t, 1e-6, implementation="torch"), double)


@pytest.mark.parametrize(("which", "offset", "dtype"), VARIANTS, ids=str)
def test_torch_step_by_step(which: str, offset: float, dtype: torch.dtype) -> None:
    """The registered operation, where "auto" finds no kernel on a GPU."""
    one = operation("torch", which, offset)

    def ours(x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
        return package._call(x, w, b, 1e-6, offset, "torch")[0]

    checks.check_shape(checks.Operation(ours=ours, theirs=one.theirs, inputs=one.inputs), dtype, (7, 100))


def test_bad_input_is_refused_with_a_sentence() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), expected \(8,\)"):
        package.layer_norm(x, torch.ones(7), None, 1e-6)
    with pytest.raises(ValueError, match=r"bias has shape \(7,\), expected \(8,\)"):
        package.add_layer_norm(x, x, None, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match=r"x has shape \(2, 8\), residual \(1, 8\)"):
        package.add_layer_norm(x, x[:1], None, None, 1e-6)
    with pytest.raises(ValueError, match="order 'cast_then_mul' is unknown"):
        package.layer_norm(x, None, None, 1e-6, order="cast_then_mul")
    with pytest.raises(ValueError, match="Did you mean 'triton'"):
        package.add_layer_norm(x, x, None, None, 1e-6, implementation="tritn")
    with pytest.raises(ValueError, match="float64"):
        package.layer_norm(x.double(), None, None, 1e-6, implementation="triton")


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.zeros(2**19 + 3, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(4096, device="cuda")
    last = x[-1:].clone().requires_grad_()
    x.requires_grad_()
    y = package.layer_norm(x, None, None, 1e-6, implementation="triton")
    expected = package.layer_norm(last, None, None, 1e-6, implementation="triton")
    assert torch.equal(y[-1:], expected)
    (grad,) = torch.autograd.grad(y, x, y)
    assert torch.equal(grad[-1:], torch.autograd.grad(expected, last, expected)[0])


def check_package(implementation: str, layer_norm_package: ModuleType) -> None:
    """What a mutant must not survive: every branch, several rows a program, and every property once."""
    alone = [
        (operation(implementation, which, offset, layer_norm_package=layer_norm_package), dtype)
        for which, offset, dtype in VARIANTS
    ]
    added = [
        (addition(implementation, *options, layer_norm_package=layer_norm_package), dtype)
        for *options, dtype in ADDITIONS
    ]
    for one, dtype in alone + added:
        checks.check_shape(one, dtype, (7, 100))
    for one, dtype in alone + added[:2]:
        checks.check_rounding(one, dtype)
    checks.check_shape(added[3][0], torch.float32, (0, 8))
    for check in PROPERTIES:
        check(added[3][0], torch.float32)
        if check not in MORE_THAN_A_KERNEL:
            check(alone[3][0], torch.float32)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    implementation = "torch" if "eager" in mutant.file else "triton"
    check_caught(mutant, partial(check_package, implementation), tmp_path)


@pytest.mark.parametrize("file", ["fused.py", "eager.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"layer_norm/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as layer_norm_package:
        check_package("torch" if file == "eager.py" else "triton", layer_norm_package)
