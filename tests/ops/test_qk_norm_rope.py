"""qk_norm_rope against its definition: values, gradients, properties, and mistakes that must be caught."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from automodel_accel.kernels import qk_norm_rope as package
from tests.ops import checks
from tests.ops.mutants_qk_norm_rope import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated
from tests.ops.test_rope import Options as RopeOptions
from tests.ops.test_rope import tables

IMPLEMENTATIONS = ("triton", "torch")
EPS = 1e-3


@dataclass(frozen=True)
class Options(RopeOptions):
    """One way to call qk_norm_rope; `weight` is the dtype of the weights, or None for q's."""

    offset: float = 0.0
    order: str = "cast_then_mul"
    weight: torch.dtype | None = None

    def keywords(self) -> dict[str, object]:
        """For qk_norm_rope and its definition."""
        return {**RopeOptions.keywords(self), "offset": self.offset, "order": self.order}


# every branch of the kernels
VARIANTS = (
    (Options(), torch.bfloat16),
    (Options("interleaved", head_axis=2, offset=1.0, order="mul_then_cast"), torch.bfloat16),
    (Options("deinterleaved", per_pair=True, keep_dtype=True, weight=torch.float32), torch.bfloat16),
    (Options("interleaved", per_pair=True, rest=6, table=torch.float32), torch.bfloat16),
    (Options(rest=10, one_row=True, inverse=True, offset=1.0), torch.float32),
    (Options("deinterleaved", keep_dtype=True, table=torch.float32, order="mul_then_cast"), torch.float16),
    (Options(per_pair=True, table=torch.bfloat16, head_axis=2, weight=torch.bfloat16), torch.float32),
)


def operation(
    implementation: str, options: Options, dtype: torch.dtype, tested: ModuleType = package
) -> checks.Operation:
    """qk_norm_rope with its options fixed, of q, k and two weights; the outputs are one after another in one vector.

    The activations' shape is as in test_rope: [..., P] with P pairs a head, and k with one head more than q.
    """

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        *lead, pairs = shape
        batch, tokens, heads = (*(1,) * (3 - len(lead)), *lead)
        size = 2 * pairs + options.rest
        q, k = (checks.normal(generator, (batch, tokens, n, size), dtype) for n in (heads, heads + 1))
        weights = (checks.normal(generator, (size,), options.weight or dtype) for _ in "qk")
        return *((x.transpose(1, 2) if options.head_axis == 1 else x) for x in (q, k)), *weights

    def run(function: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., torch.Tensor]:
        def outputs(*given: torch.Tensor) -> torch.Tensor:
            cos, sin = tables(given[0], options, dtype)
            if given[0].dtype == torch.float64:  # the truth, of the same tables
                cos, sin = cos.double(), sin.double()
            return torch.cat([output.flatten() for output in function(*given, cos, sin, EPS)])

        return outputs

    def definition(
        q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, *others: object
    ) -> tuple[torch.Tensor, ...]:
        sides = ((q, q_weight), (k, k_weight))
        return tuple(package.reference.normalise_and_rotate(*side, *others, **options.keywords()) for side in sides)  # type: ignore[arg-type]

    ours = partial(tested.qk_norm_rope, **options.keywords(), implementation=implementation)
    return checks.Operation(ours=run(ours), theirs=run(definition), inputs=inputs, activations=2)


SHAPES = ((1, 1), (3, 7), (2, 3, 2, 20), (1, 2, 40, 64), (0, 8), (2, 0, 5), (9,), (1, 2, 1, 150))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_option(implementation: str, variant: tuple[Options, torch.dtype]) -> None:
    options, dtype = variant
    checks.check_shape(operation(implementation, options, dtype), dtype, (2, 2, 2, 10), draws=2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(implementation: str, shape: tuple[int, ...]) -> None:
    options, dtype = VARIANTS[3]
    checks.check_shape(operation(implementation, options, dtype), dtype, shape, draws=1 if math.prod(shape) > 9 else 6)


PROPERTIES = tuple(check for check in checks.PROPERTIES if check is not checks.check_rounding)  # ours rounds once


@pytest.mark.parametrize(("implementation", "variant"), [("triton", VARIANTS[3]), ("torch", VARIANTS[4])], ids=str)
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_properties(implementation: str, check: checks.Check, variant: tuple[Options, torch.dtype]) -> None:
    options, dtype = variant
    check(operation(implementation, options, dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=8, derandomize=True, deadline=None, database=None)
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 5), st.integers(4, 70)),
    variant=st.sampled_from(VARIANTS),
)
def test_drawn_shapes(implementation: str, shape: tuple[int, ...], variant: tuple[Options, torch.dtype]) -> None:
    options, dtype = variant
    checks.check_shape(operation(implementation, options, dtype), dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled(implementation: str) -> None:
    for options, _ in VARIANTS[:2]:
        torch._dynamo.reset()
        checks.check_compiled(operation(implementation, options, torch.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head_axis", [1, 2])
def test_registered(implementation: str, head_axis: int) -> None:
    q, k = (torch.randn(2, 3, n, 10) for n in (4, 2))
    q, k = ((x.transpose(1, 2) if head_axis == 1 else x).detach().requires_grad_() for x in (q, k))
    weights = [torch.randn(10, requires_grad=True) for _ in "qk"]
    options = (EPS, 1.0, "cast_then_mul", "half", head_axis, False, False, False, implementation)
    arguments = (q, k, *weights, *torch.randn(2, 1, 3, 8), *options)
    library.opcheck(torch.ops.automodel_accel.qk_norm_rope.default, arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_functorch_is_refused(implementation: str) -> None:
    checks.check_functorch(operation(implementation, Options(), torch.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wanted", [0, 1])
def test_only_one_is_used(implementation: str, wanted: int) -> None:
    """Where the loss sees one of the outputs, the other input and its weight get no gradient, and these their own."""
    sides = [[torch.randn(1, n, 4, 8, requires_grad=True), torch.randn(8, requires_grad=True)] for n in (3, 2)]
    cos, sin = torch.randn(2, 1, 4, 8)
    (q, q_weight), (k, k_weight) = sides
    outputs = package.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, EPS, implementation=implementation)
    outputs[wanted].square().sum().backward()
    assert [x.grad for x in sides[1 - wanted]] == [None, None]
    leaves = [x.detach().requires_grad_() for x in sides[wanted]]
    package.reference.normalise_and_rotate(*leaves, cos, sin, EPS).square().sum().backward()
    torch.testing.assert_close([x.grad for x in sides[wanted]], [x.grad for x in leaves])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_saved_for_backward_is_no_copy(implementation: str) -> None:
    """q, k, the weights, cos and sin as they came; and one float a head."""
    q, k = torch.randn(1, 3, 4, 8, requires_grad=True), torch.randn(1, 2, 4, 8, requires_grad=True)
    weights = [torch.randn(8) for _ in "qk"]
    cos, sin = torch.randn(2, 4, 8)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        package.qk_norm_rope(q, k, *weights, cos, sin, EPS, implementation=implementation)
    assert [x.data_ptr() for x in saved[:6]] == [x.data_ptr() for x in (q, k, *weights, cos, sin)]
    assert [tuple(x.shape) for x in saved[6:]] == [(1, 4, 3), (1, 4, 2)]


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "unknown layout": ({"layout": "halves"}, "Did you mean 'half'"),
    "unknown order": ({"order": "mul"}, "unknown order 'mul'"),
    "tables of other tokens": ({"cos": torch.ones(5, 8), "sin": torch.ones(5, 8)}, r"qk_norm_rope: cos is \(5, 8\)"),
    "weights over all heads": ({"q_weight": torch.ones(24)}, r"q_weight is \(24,\) .*, expected \(8,\)"),
    "weights of two dtypes": ({"k_weight": torch.ones(8).bfloat16()}, "k_weight is .* expected .* torch.float32"),
    "k of other tokens": ({"k": torch.ones(2, 3, 5, 8)}, "the same but for the number of heads"),
    "tables with a gradient": ({"cos": torch.ones(4, 8, requires_grad=True)}, "wants a gradient"),
}


@pytest.mark.parametrize(("changed", "sentence"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_a_sentence(changed: dict[str, object], sentence: str) -> None:
    x, table, weight = torch.ones(2, 3, 4, 8), torch.ones(4, 8), torch.ones(8)
    arguments = {"q": x, "k": x, "q_weight": weight, "k_weight": weight, "cos": table, "sin": table, "eps": EPS}
    package.qk_norm_rope(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=sentence):
        package.qk_norm_rope(**{**arguments, **changed})  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    tokens = 2**17 + 3
    q = torch.zeros(1, tokens, 128, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    q[:, -1, -1] = torch.randn(1, 128, device="cuda").bfloat16()
    last = q[:, -1:, -1:].clone().requires_grad_()
    q.requires_grad_()
    weight, (cos, sin) = torch.randn(128, device="cuda").bfloat16(), torch.randn(2, tokens, 128, device="cuda")
    form = {"keep_dtype": True, "implementation": "triton"}
    y, _ = package.qk_norm_rope(q, last.detach().expand(1, 1, tokens, 128), weight, weight, cos, sin, EPS, **form)
    expected, _ = package.qk_norm_rope(last, last.detach(), weight, weight, cos[-1:], sin[-1:], EPS, **form)
    torch.testing.assert_close(y[:, -1:, -1:], expected)
    (grad,) = torch.autograd.grad(y, q, y)
    torch.testing.assert_close(grad[:, -1:, -1:], torch.autograd.grad(expected, last, expected)[0])


def check_package(implementation: str, tested: ModuleType) -> None:
    """What a mutant must not survive: every branch, several tiles a token and a program, and every property once."""
    for options, dtype in VARIANTS:
        checks.check_shape(operation(implementation, options, dtype, tested), dtype, (2, 2, 2, 10), draws=1)
    options, dtype = VARIANTS[3]
    one = operation(implementation, options, dtype, tested)
    checks.check_shape(one, dtype, (1, 2, 40, 64))
    checks.check_shape(operation(implementation, *VARIANTS[4], tested), torch.float32, (2, 3, 17, 64), draws=1)
    checks.check_shape(one, dtype, (0, 8))
    for check in (checks.check_layouts, checks.check_nothing_overwritten, checks.check_frozen_inputs):
        check(one, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    check_caught(mutant, partial(check_file, mutant.file, tmp_path), tmp_path)


def check_file(file: str, folder: Path, tested: ModuleType) -> None:
    """What catches mutants; for the heads, on launches that are loaded again, and so import them anew."""
    if file.endswith("heads.py"):
        with mutated(Mutant("qk_norm_rope/fused.py", "import torch\n", "import torch\n", "none"), folder) as anew:
            check_package("triton", anew)
    else:
        check_package("torch" if file.endswith("eager.py") else "triton", tested)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["fused.py", "heads.py", "eager.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    line = "import triton\n" if file == "heads.py" else "import torch\n"
    with mutated(Mutant(f"qk_norm_rope/{file}", line, line, "no mistake"), tmp_path) as tested:
        check_file(file, tmp_path, tested)
