"""What adapters add to products that somebody else computed, against its definition: values, memory, and mistakes that are caught."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from automodel_accel.kernels.lora import Adapter, Form, beside, draw_mask, reference
from automodel_accel.kernels.recompute import remember, source_of
from tests.ops import checks
from tests.ops.mutation import Mutant, check_caught

WIDTHS, RANKS = (5, 8, 3), (3, 2, 4)
SCALE = 0.7
FILE = "lora/beside.py"
# how torch's GEMM sums depends on the layout; where it rounds, on the order of the sum
PROPERTIES = tuple(check for check in checks.PROPERTIES if check not in (checks.check_layouts, checks.check_rounding))


def operation(
    dropout: tuple[float, ...] = (0.0, 0.0, 0.0),
    ranks: tuple[int, ...] = RANKS,
    low: torch.dtype | None = None,
    given_away: bool = True,
    noted: bool = False,
    module: ModuleType = beside,
) -> checks.Operation:
    """Adapters of one input, one for each dropout, in the dtype `low` (None: of the products); all outputs in a row."""
    count = len(dropout)

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        def draw(*size: int, of: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
            return checks.normal(generator, size, torch.float32).mul_(scale).to(of)

        sizes = list(zip(WIDTHS[:count], ranks, strict=False))
        products = [draw(*shape[:-1], width) for width, _ in sizes]
        a = [draw(rank, shape[-1], of=low or dtype, scale=shape[-1] ** -0.5) for _, rank in sizes]
        return draw(*shape), *products, *a, *(draw(*size, of=low or dtype) for size in sizes)

    def parts(rest: tuple[Any, ...]) -> tuple[Any, list[Adapter]]:
        products, a, b = rest[:count], rest[count : 2 * count], rest[2 * count :]
        return products, [Adapter(one, two, Form(SCALE, p)) for one, two, p in zip(a, b, dropout, strict=True)]

    def ours(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        products, adapters = parts(rest)
        torch.manual_seed(0)
        source = None
        if noted:
            y = x * 1
            remember(y, lambda saved: saved * 1, x)
            x, source = y, source_of(y)
        made = [product * 1 for product in products]  # no leaves, as a library's products
        outputs = module.beside(x, made, adapters, given_away=given_away, source=source)
        return torch.cat([output.flatten() for output in outputs])

    def theirs(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        products, adapters = parts(rest)
        torch.manual_seed(0)
        masks = [
            draw_mask(x.to(low or torch.float32), one.form.dropout) if one.form.dropout else None for one in adapters
        ]
        return torch.cat([output.flatten() for output in reference.beside(x, products, adapters, masks=masks)])

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs)


@pytest.mark.parametrize("noted", [False, True], ids=["input", "source"])
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [(0.0,), (0.0, 0.0, 0.0), (0.5, 0.0, 0.25), (1.0, 0.5)], ids=str)
def test_shapes(dropout: tuple[float, ...], dtype: torch.dtype, noted: bool) -> None:
    for shape in ((2, 4, 64), (1, 1), (3, 7), (0, 8), (9,)):
        checks.check_shape(operation(dropout, given_away=noted, noted=noted), dtype, shape)


@pytest.mark.parametrize("given_away", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_of_narrow_products(dtype: torch.dtype, given_away: bool) -> None:
    for shape in ((2, 4, 64), (3, 7), (33, 3)):
        checks.check_shape(operation((0.0, 0.5, 0.0), low=torch.float32, given_away=given_away), dtype, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_properties(check: checks.Check, dtype: torch.dtype) -> None:
    # of small ranks a gradient has so few elements that chance would decide; one alone: of several, A's gradients are parts of one
    check(operation((0.0,), ranks=(16,)), dtype)
    check(operation((0.5,), ranks=(16,), noted=True), dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.sampled_from([1, 2, 7, 8, 16, 64, 256]), min_size=3, max_size=3).map(tuple),
    dropout=st.lists(st.sampled_from([0.0, 0.05, 0.9]), min_size=1, max_size=3).map(tuple),
    rows=st.integers(1, 40),
    hidden=st.sampled_from([1, 3, 16, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    wide_adapters=st.booleans(),
    given_away=st.booleans(),
)
def test_any_adapters(
    ranks: Any, dropout: Any, rows: int, hidden: int, dtype: torch.dtype, wide_adapters: bool, given_away: bool
) -> None:
    low = torch.float32 if wide_adapters else None
    checks.check_shape(operation(dropout, ranks, low, given_away), dtype, (rows, hidden))


def check_autocast(module: ModuleType) -> None:
    """The adapters are computed in autocast's dtype; the output is in the product's, gradients are in the dtypes of their tensors."""
    torch.manual_seed(0)
    x, product = torch.randn(6, 10, requires_grad=True), torch.zeros(6, 4, requires_grad=True)
    one = adapter(10, 4)
    with torch.autocast("cpu", torch.bfloat16):
        (output,) = module.beside(x, [product], [one])
        (expected,) = reference.beside(x, [product], [one])
    assert output.dtype is expected.dtype is torch.float32
    assert torch.equal(output, expected)  # products in bfloat16, added to zeros
    inputs = (x, product, one.a_RH, one.b_FR)
    assert {grad.dtype for grad in torch.autograd.grad(output.sum(), inputs)} == {torch.float32}


def adapter(hidden: int, width: int, dropout: float = 0.0) -> Adapter:
    return Adapter(torch.randn(2, hidden).requires_grad_(), torch.randn(width, 2).requires_grad_(), Form(1.0, dropout))


def check_memory(module: ModuleType, dtype: torch.dtype = torch.float32) -> None:
    """An output is in the memory of its product where that was given away, and else the product stays as it was."""
    x = torch.randn(6, 10, requires_grad=True)
    leaf = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    strided = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    product, view = leaf * 1, (leaf * 1).view(6, 4)
    frozen = torch.randn(6, 4, dtype=dtype)
    kept = {"leaf": leaf, "view": view, "strided": (strided * 1).t()}
    for name, base in kept.items():
        before = base.detach().clone()
        (output,) = module.beside(x, [base], [adapter(10, 4)], given_away=True)
        assert torch.equal(base, before), name
        assert output.data_ptr() != base.data_ptr(), name
    for base in (product, frozen):
        address, before = base.data_ptr(), base.detach().clone()
        (output,) = module.beside(x, [base], [adapter(10, 4)])
        assert output.data_ptr() != address
        assert torch.equal(base, before)
        (output,) = module.beside(x, [base], [adapter(10, 4)], given_away=True)
        assert output.data_ptr() == address
        output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whose_memory_the_outputs_are(dtype: torch.dtype) -> None:
    check_memory(beside, dtype)


def test_a_product_that_its_maker_keeps_is_noticed_and_not_used_changed() -> None:
    x = torch.randn(6, 10, requires_grad=True)
    product = torch.randn(6, 4, requires_grad=True).exp()  # whose backward needs its output
    (output,) = beside.beside(x, [product], [adapter(10, 4)], given_away=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    (output,) = beside.beside(x, [torch.randn(6, 4, requires_grad=True).exp()], [adapter(10, 4)])
    output.sum().backward()


def check_through(module: ModuleType) -> None:
    """The gradient of a product is that of the output itself: no kernel, no copy, nothing written."""
    x, product = torch.randn(6, 10, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    (output,) = module.beside(x, [product], [adapter(10, 4)])
    grad_output = torch.randn(6, 4)
    before = grad_output.clone()
    found, _ = torch.autograd.grad(output, (product, x), grad_output)
    assert found.data_ptr() == grad_output.data_ptr()
    assert torch.equal(grad_output, before)


def test_the_gradient_is_handed_through() -> None:
    check_through(beside)


def test_autocast() -> None:
    check_autocast(beside)


def test_an_output_that_nobody_uses() -> None:
    x = torch.randn(6, 10, requires_grad=True)
    adapters = [adapter(10, 4, 0.5), adapter(10, 3)]
    first, _ = beside.beside(x, [torch.zeros(6, 4), torch.zeros(6, 3)], adapters, given_away=True)
    parameters = [tensor for one in adapters for tensor in (one.a_RH, one.b_FR)]
    grads = torch.autograd.grad(first.sum(), [x, *parameters], allow_unused=True)
    assert [grad is not None for grad in grads] == [True, True, True, False, False]


def check_kept(module: ModuleType) -> None:
    """Of 64 numbers a row, neither a mask nor a copy nor a product: x, p, and parameters; only p where no A trains."""
    for trains, numbers in ((True, 64 + RANKS[0] + RANKS[1]), (False, RANKS[0] + RANKS[1])):
        made = operation((0.5, 0.0), low=torch.float32, module=module)
        leaves = [x if x is None else x.requires_grad_() for x in made.draw((100, 64), torch.bfloat16)]
        for a in leaves[3:5]:
            a.requires_grad_(trains)
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            made.ours(*leaves)
        parameters = {leaf.untyped_storage().data_ptr() for leaf in leaves[1:] if leaf is not None}
        rows = [tensor for address, tensor in kept.items() if address not in parameters]
        assert sum(tensor.numel() for tensor in rows) == 100 * numbers
        assert not trains or sum(tensor.nbytes for tensor in rows) == 100 * (64 * 2 + (RANKS[0] + RANKS[1]) * 4)


def test_what_is_kept_does_not_depend_on_dropout_or_on_the_adapters_dtype() -> None:
    check_kept(beside)


@pytest.mark.parametrize(
    ("product", "made", "said"),
    [
        (
            (3, 4),
            Adapter(torch.ones(2, 5), torch.ones(4, 2), Form(1.0)),
            r"shapes \(2, 5\) and \(4, 2\), expected \[R, 6\]",
        ),
        ((3, 4), Adapter(torch.ones(2, 6), torch.ones(5, 2), Form(1.0)), r"expected \[R, 6\] and \[4, R\]"),
        ((3, 4), Adapter(torch.ones(2, 6), torch.ones(4, 2), Form(1.0, 1.1)), "dropout 1.1, expected 0 to 1"),
        ((2, 4), Adapter(torch.ones(2, 6), torch.ones(4, 2), Form(1.0)), r"a product is \(2, 4\), expected \(3, 'F'\)"),
    ],
    ids=["A", "B", "dropout", "rows"],
)
def test_errors_say_what_came(product: tuple[int, ...], made: Adapter, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        beside.beside(torch.ones(3, 6), [torch.ones(product)], [made])
    with pytest.raises(ValueError, match="2 products and 1 adapters; expected one for each"):
        beside.beside(torch.ones(3, 6), [torch.ones(3, 4)] * 2, [made])


def check_values(module: ModuleType) -> None:
    for dropout, low in (((0.0, 0.0, 0.0), None), ((0.5, 0.0), None), ((0.0, 0.5), torch.float32)):
        made = operation(dropout, low=low, given_away=low is not None, module=module)
        checks.check_shape(made, torch.bfloat16 if low else torch.float32, (3, 7))
        checks.check_frozen_inputs(made, torch.float32) if len(dropout) == 2 and low is None else None


VALUES = (
    Mutant(FILE, "b_FR.t(), alpha=form.factor", "b_FR.t()", "unscaled where the dtypes are one"),
    Mutant(FILE, "rows += module.product", "rows -= module.product", "subtracted where they differ"),
    Mutant(FILE, "grad_x = module.grad_input(", "grad_x = 2 * module.grad_input(", "gradient of x"),
    Mutant(FILE, "module.grad_b(given[i], p[i],", "module.grad_b(given[i], p[i].abs(),", "gradient of B"),
    Mutant(FILE, "*(grad_outputs[i] if", "*(grad_outputs[i] * 2 if", "gradient of a product"),
    Mutant(FILE, "else base.clone() for", "else base.clone() * 2 for", "a copy that is none"),
)
MUTANTS = (
    *((check_values, mutant) for mutant in VALUES),
    (check_through, Mutant(FILE, "*(grad_outputs[i] if", "*(grad_outputs[i] * 1 if", "the gradient is copied")),
    (check_memory, Mutant(FILE, "given_away and _may_write", "_may_write", "written though it was not given away")),
    (check_memory, Mutant(FILE, "given_away and _may_write(base)", "False", "never written")),
    (check_kept, Mutant(FILE, "range(len(forms))), *kept)", "range(len(forms))), *kept, rows)", "a cast x is kept")),
    (check_kept, Mutant(FILE, "() if not any(needs_a) else (x,)", "(x,)", "x is kept for nothing")),
)


@pytest.mark.parametrize(("check", "mutant"), MUTANTS, ids=lambda value: getattr(value, "why", ""))
def test_mutants_are_caught(check: Any, mutant: Mutant, tmp_path: Path) -> None:
    check_caught(mutant, lambda _: check(sys.modules["automodel_accel.kernels.lora.beside"]), tmp_path)
