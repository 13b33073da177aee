"""rope against its definition: values, gradients, properties, and mistakes that must be caught."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from automodel_accel.kernels import rope as package
from tests.ops import checks
from tests.ops.mutants_rope import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated

IMPLEMENTATIONS = package.KERNEL.names()


@dataclass(frozen=True)
class Options:
    """One way to call rope. `rest` elements of a head are not rotated; `table` is the dtype of cos and sin, or None for q's."""

    layout: str = "half"
    head_axis: int = 1
    per_pair: bool = False
    inverse: bool = False
    keep_dtype: bool = False
    rest: int = 0
    table: torch.dtype | None = None
    one_row: bool = False

    def keywords(self) -> dict[str, object]:
        """For rope and its definition."""
        return {name: getattr(self, name) for name in ("layout", "head_axis", "per_pair", "inverse", "keep_dtype")}


# every branch of the kernels
VARIANTS = (
    (Options(), torch.bfloat16),
    (Options("interleaved", head_axis=2), torch.bfloat16),
    (Options("deinterleaved", per_pair=True), torch.bfloat16),
    (Options("interleaved", per_pair=True, rest=6, table=torch.float32), torch.bfloat16),
    (Options(rest=10, one_row=True, inverse=True), torch.float32),
    (Options("deinterleaved", keep_dtype=True, table=torch.float32), torch.float16),
    (Options(per_pair=True, table=torch.bfloat16, head_axis=2), torch.float32),
)


def operation(
    implementation: str, options: Options, dtype: torch.dtype, rope_package: ModuleType = package
) -> checks.Operation:
    """rope with its options fixed, as a function of q and k; the outputs are one after another in one vector.

    The activations' shape is [..., P] with P pairs a head, so that any number will do; q has the leading axes, filled up with
    ones to [B, S, H], and k one head more.
    """

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        *lead, pairs = shape
        batch, tokens, heads = (*(1,) * (3 - len(lead)), *lead)
        sizes = [(batch, tokens, n, 2 * pairs + options.rest) for n in (heads, heads + 1)]
        return tuple(_laid_out(checks.normal(generator, size, dtype), options) for size in sizes)

    def run(rotate: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., torch.Tensor]:
        def outputs(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            cos, sin = tables(q, options, dtype)
            if q.dtype == torch.float64:  # the truth, of the same tables
                cos, sin = cos.double(), sin.double()
            return torch.cat([output.flatten() for output in rotate(q, k, cos, sin)])

        return outputs

    def definition(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(package.reference.rotate(x, cos, sin, **options.keywords()) for x in (q, k))

    ours = partial(rope_package.rope, **options.keywords(), implementation=implementation)
    return checks.Operation(ours=run(ours), theirs=run(definition), inputs=inputs, activations=2)


def tables(q: torch.Tensor, options: Options, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for q, all values different; without a generator, which torch.compile does not trace."""
    rotary_dim = q.shape[-1] - options.rest
    size = (q.shape[0], q.shape[3 - options.head_axis], rotary_dim // 2 if options.per_pair else rotary_dim)
    count = torch.arange(size[0] * size[1] * size[2], dtype=torch.float64, device=q.device).view(size)
    cos, sin = (1.5 * torch.sin(count * step + step).to(options.table or dtype) for step in (1.7, 2.3))
    return (cos[:1], sin[:1]) if options.one_row else (cos, sin)


def _laid_out(x_BSHD: torch.Tensor, options: Options) -> torch.Tensor:
    return x_BSHD.transpose(1, 2) if options.head_axis == 1 else x_BSHD


SHAPES = (
    (2, 3, 4, 8),
    (1, 1),
    (3, 7),
    (2, 5, 2, 20),
    (4, 5, 1, 63),
    (2, 1, 40, 64),
    (0, 8),
    (2, 0, 5),
    (9,),
    (1, 2, 1, 300),
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("layout", package.LAYOUTS)
@pytest.mark.parametrize("per_pair", [False, True])
def test_every_option(implementation: str, dtype: torch.dtype, layout: str, per_pair: bool) -> None:
    for inverse, keep_dtype, rest in itertools.product((False, True), (False, True), (0, 6)):
        options = Options(layout, 1 + keep_dtype, per_pair, inverse, keep_dtype, rest, torch.float32)
        checks.check_shape(operation(implementation, options, dtype), dtype, (2, 3, 2, 10))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(implementation: str, shape: tuple[int, ...]) -> None:
    for options, dtype in VARIANTS:
        checks.check_shape(operation(implementation, options, dtype), dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("check", checks.PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS[1:5], ids=str)
def test_properties(implementation: str, check: checks.Check, variant: tuple[Options, torch.dtype]) -> None:
    options, dtype = variant
    check(operation(implementation, options, dtype), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 70)),
    variant=st.sampled_from(VARIANTS),
    rest=st.sampled_from((0, 1, 16)),
)
def test_drawn_shapes(
    implementation: str, shape: tuple[int, ...], variant: tuple[Options, torch.dtype], rest: int
) -> None:
    options, dtype = variant
    checks.check_shape(operation(implementation, replace(options, rest=rest), dtype), dtype, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiled(implementation: str, variant: tuple[Options, torch.dtype]) -> None:
    options, _ = variant
    torch._dynamo.reset()  # or the variants would count as recompilations of one function
    checks.check_compiled(operation(implementation, options, torch.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("with_k", [True, False])
@pytest.mark.parametrize("head_axis", [1, 2])
def test_registered(implementation: str, with_k: bool, head_axis: int) -> None:
    q, k = (torch.randn(2, 3, n, 10) for n in (4, 2))
    q, k = (_laid_out(x, Options(head_axis=head_axis)) for x in (q, k))
    cos, sin = torch.randn(2, 1, 3, 8)
    arguments = ("half", head_axis, False, False, False, implementation)
    wanted = [x.detach().requires_grad_() if x is not None else None for x in (q, k if with_k else None)]
    library.opcheck(torch.ops.automodel_accel.rope.default, (*wanted, cos, sin, *arguments))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_functorch_is_refused(implementation: str) -> None:
    checks.check_functorch(operation(implementation, Options(), torch.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wanted", ["q", "k"])
def test_only_one_is_used(implementation: str, wanted: str) -> None:
    """Where the loss sees one of the outputs, the other input gets no gradient, and this one its own."""
    q, k = torch.randn(1, 3, 4, 8, requires_grad=True), torch.randn(1, 2, 4, 8, requires_grad=True)
    cos, sin = torch.randn(2, 1, 4, 8)
    outputs = dict(zip("qk", package.rope(q, k, cos, sin, implementation=implementation), strict=True))
    outputs[wanted].square().sum().backward()
    used, unused = (q, k) if wanted == "q" else (k, q)
    assert unused.grad is None
    leaf = used.detach().requires_grad_()
    package.reference.rotate(leaf, cos, sin).square().sum().backward()
    torch.testing.assert_close(used.grad, leaf.grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_tensor_alone(implementation: str) -> None:
    q = torch.randn(1, 3, 4, 8)
    cos, sin = torch.randn(2, 4, 8)
    one, nothing = package.rope(q, None, cos, sin, implementation=implementation)
    assert nothing is None
    torch.testing.assert_close(one, package.reference.rotate(q, cos, sin))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head_axis", [0, 1])
def test_without_a_batch(implementation: str, head_axis: int) -> None:
    tokens = 4
    q = torch.randn((3, tokens, 8) if head_axis == 0 else (tokens, 3, 8), requires_grad=True)
    cos, sin = torch.randn(2, tokens, 8)
    results = []
    for rotate in (partial(package.rope, q, None, implementation=implementation), partial(package.reference.rotate, q)):
        y = rotate(cos, sin, head_axis=head_axis)
        y = y[0] if isinstance(y, tuple) else y
        results.append((y, *torch.autograd.grad(y.square().sum(), q)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 2, 3), (1, 2, 0, 3), (0, 1, 3, 2)])
def test_strides(implementation: str, order: tuple[int, ...]) -> None:
    """The outputs lie in memory as torch would lay them out; the gradients' strides, and the incoming ones', are of no matter."""
    q = torch.randn(2, 3, 4, 8).permute(order).contiguous().permute([order.index(i) for i in range(4)])
    k = torch.randn(2, 4, 5, 24).transpose(1, 2)[:, ::2, :, 8:16]
    cos, sin = torch.randn(2, 1, 4, 8)
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    outputs = package.rope(*leaves, cos, sin, implementation=implementation)
    for y, x in zip(outputs, leaves, strict=True):
        assert y is not None
        assert y.stride() == torch.empty_like(x if x.stride(-1) == 1 else x.contiguous()).stride()
    incoming = [torch.randn(y.shape[::-1]).permute(3, 2, 1, 0) for y in outputs if y is not None]
    grads = torch.autograd.grad(outputs, leaves, incoming)  # type: ignore[arg-type]
    same = [x.detach().contiguous().requires_grad_() for x in (q, k)]
    expected = [package.reference.rotate(x, cos, sin) for x in same]
    torch.testing.assert_close([*outputs, *grads], [*expected, *torch.autograd.grad(expected, same, incoming)])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outputs_share_no_memory(implementation: str) -> None:
    q, k = torch.randn(1, 3, 4, 8, requires_grad=True), torch.randn(1, 2, 4, 8, requires_grad=True)
    cos, sin = torch.zeros(2, 4, 4)
    outputs = package.rope(q, k, cos, sin, implementation=implementation)
    grads = torch.autograd.grad([y for y in outputs if y is not None], (q, k), [torch.ones_like(q), torch.ones_like(k)])
    memory = {x.untyped_storage().data_ptr() for x in (q, k, *outputs, *grads) if x is not None}
    assert len(memory) == 6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_saved_for_backward_are_cos_and_sin_alone(implementation: str) -> None:
    q, k = torch.randn(1, 3, 4, 8, requires_grad=True), torch.randn(1, 2, 4, 8, requires_grad=True)
    cos, sin = torch.randn(2, 4, 8)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        package.rope(q, k, cos, sin, implementation=implementation)
    assert [x.data_ptr() for x in saved] == [cos.data_ptr(), sin.data_ptr()]


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "unknown layout": ({"layout": "halves"}, "Did you mean 'half'"),
    "head axis": ({"head_axis": 3}, "head_axis=3 for q"),
    "tables of other tokens": (
        {"cos": torch.ones(5, 8), "sin": torch.ones(5, 8)},
        r"cos is \(5, 8\), expected \[..., 4, R\]",
    ),
    "tables of other batch": (
        {"cos": torch.ones(3, 4, 8), "sin": torch.ones(3, 4, 8)},
        r"cos is \(3, 4, 8\), expected",
    ),
    "sin of another dtype": ({"sin": torch.ones(4, 8).bfloat16()}, "sin is .* expected the same"),
    "too many angles": ({"per_pair": True}, "rotates 16 elements, expected an even number up to 8"),
    "an odd number": ({"cos": torch.ones(4, 7), "sin": torch.ones(4, 7)}, "rotates 7 elements"),
    "k of another dtype": ({"k": torch.ones(2, 3, 4, 8).bfloat16()}, "k is .* expected the same dtype"),
    "k of other tokens": ({"k": torch.ones(2, 3, 5, 8)}, "the same but for the number of heads"),
    "tables with a gradient": ({"cos": torch.ones(4, 8, requires_grad=True)}, "wants a gradient"),
    "float64 in triton": ({"q": torch.ones(2, 3, 4, 8).double(), "k": None, "implementation": "triton"}, "float64"),
}


@pytest.mark.parametrize(("changed", "sentence"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_a_sentence(changed: dict[str, object], sentence: str) -> None:
    x, table = torch.ones(2, 3, 4, 8), torch.ones(4, 8)
    arguments = {"q": x, "k": x, "cos": table, "sin": table, **changed}
    with pytest.raises(ValueError, match=sentence):
        package.rope(**arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("head_axis", [1, 2])
def test_more_than_two_to_the_31_elements(head_axis: int) -> None:
    tokens = 2**17 + 3
    q = torch.zeros(
        (1, 128, tokens, 128) if head_axis == 1 else (1, tokens, 128, 128), dtype=torch.bfloat16, device="cuda"
    )
    at = (slice(None), slice(-1, None), slice(-1, None))
    q[at] = torch.randn(1, 1, 1, 128, device="cuda").bfloat16()
    last = q[at].clone().requires_grad_()
    q.requires_grad_()
    cos, sin = torch.randn(2, tokens, 128, device="cuda")
    y, _ = package.rope(q, None, cos, sin, head_axis=head_axis, keep_dtype=True, implementation="triton")
    expected = package.reference.rotate(last, cos[-1:], sin[-1:], head_axis=head_axis, keep_dtype=True)
    torch.testing.assert_close(y[at], expected)
    (grad,) = torch.autograd.grad(y, q, y)
    torch.testing.assert_close(grad[at], torch.autograd.grad(expected, last, expected)[0])


def check_package(implementation: str, rope_package: ModuleType) -> None:
    """What a mutant must not survive: every branch, several heads a program, and every property once."""
    operations = [(operation(implementation, *variant, rope_package), variant[1]) for variant in VARIANTS]
    for one, dtype in operations:
        checks.check_shape(one, dtype, (2, 3, 2, 10))
        checks.check_rounding(one, dtype)
    one, dtype = operations[3]
    checks.check_shape(one, dtype, (2, 3, 40, 64))
    checks.check_everything(one, dtype, [(0, 8)])
    checks.check_layouts(operations[0][0], torch.bfloat16)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    implementation = "torch" if "eager" in mutant.file else "triton"
    check_caught(mutant, partial(check_package, implementation), tmp_path)


@pytest.mark.parametrize("file", ["fused.py", "eager.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"rope/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as rope_package:
        check_package("torch" if file == "eager.py" else "triton", rope_package)
