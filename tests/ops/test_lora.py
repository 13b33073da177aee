"""Low-rank adapters in `linears` against their definition: values, gradients, dropout, what is kept, and mistakes that must be caught."""

import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from automodel_accel.kernels import linear as package
from automodel_accel.kernels.linear import eager
from automodel_accel.kernels.lora import Adapter, Form, draw_mask
from automodel_accel.kernels.recompute import remember, source_of
from tests.ops import checks
from tests.ops.mutants_lora import KEPT, MASKS, VALUES
from tests.ops.mutation import Mutant, check_caught

WIDTHS = (5, 8, 3)  # of the outputs
RANKS = (3, 2, 4)
SCALE = 0.7
# how torch's GEMM sums depends on the layout; where it rounds, on the order of the sum
PROPERTIES = tuple(check for check in checks.PROPERTIES if check not in (checks.check_layouts, checks.check_rounding))


def operation(
    adapted: tuple[bool, ...] = (True, False, True),
    dropout: tuple[float, ...] = (0.0, 0.0, 0.0),
    biases: tuple[bool, ...] = (True, False, True),
    ranks: tuple[int, ...] = RANKS,
    low: torch.dtype | None = None,
    noted: bool = False,
    linear_package: ModuleType = package,
    widths: tuple[int, ...] = WIDTHS,
) -> checks.Operation:
    """Linears of one input, some with adapters in the dtype `low` (None: of the weights), all outputs in a row."""
    count = len(adapted)

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        hidden = shape[-1]

        def draw(*size: int, of: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
            return checks.normal(generator, size, torch.float32).mul_(scale).to(of)

        weights = [draw(width, hidden, scale=hidden**-0.5) for width in widths[:count]]
        vectors = [draw(width) if wanted else None for width, wanted in zip(widths[:count], biases)]
        sizes = list(zip(widths, ranks, adapted, strict=False))
        a = [draw(rank, hidden, of=low or dtype, scale=hidden**-0.5) if one else None for _, rank, one in sizes]
        b = [draw(width, rank, of=low or dtype) if one else None for width, rank, one in sizes]
        return draw(*shape), *weights, *vectors, *a, *b

    def parts(rest: tuple[Any, ...]) -> tuple[Any, Any, list[Adapter | None]]:
        weights, vectors, a, b = (rest[start : start + count] for start in range(0, 4 * count, count))
        pairs = zip(a, b, dropout, strict=False)
        return weights, vectors, [None if one is None else Adapter(one, two, Form(SCALE, p)) for one, two, p in pairs]

    def joined(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([output.flatten() for output in outputs])

    def ours(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        weights, vectors, adapters = parts(rest)
        torch.manual_seed(0)
        if noted:
            y = x * 1
            remember(y, lambda saved: saved * 1, x)
            return joined(linear_package.linears(y, weights, vectors, adapters=adapters, source=source_of(y)))
        return joined(linear_package.linears(x, weights, vectors, adapters=adapters))

    def theirs(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        weights, vectors, adapters = parts(rest)
        torch.manual_seed(0)
        masks = [
            draw_mask(x.to(low or torch.float32), adapter.form.dropout) if adapter and adapter.form.dropout else None
            for adapter in adapters
        ]
        return joined(package.reference.linears(x, weights, vectors, adapters=adapters, masks=masks))

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs)


@pytest.mark.parametrize("noted", [False, True], ids=["input", "source"])
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [(0.0, 0.0, 0.0), (0.5, 0.0, 0.25), (1.0, 0.5, 0.0)], ids=str)
@pytest.mark.parametrize("adapted", [(True,), (True, False), (False, True, True), (True, True, True)], ids=str)
def test_shapes(adapted: tuple[bool, ...], dropout: tuple[float, ...], dtype: torch.dtype, noted: bool) -> None:
    for shape in ((2, 4, 64), (1, 1), (3, 7), (0, 8), (9,)):
        checks.check_shape(operation(adapted, dropout, noted=noted), dtype, shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_of_narrow_linears(dtype: torch.dtype) -> None:
    """As PEFT keeps them by default: gradients of adapters are as exact as float32 is."""
    for shape in ((2, 4, 64), (3, 7), (33, 3)):
        checks.check_shape(operation(low=torch.float32), dtype, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_properties(check: checks.Check, dtype: torch.dtype) -> None:
    # of small ranks a gradient has so few elements that chance would decide
    if check is not checks.check_nothing_overwritten:  # of one product: see below
        check(operation((True, True), biases=(True, False), ranks=(16, 16)), dtype)
    check(operation((True, False), (0.5, 0.0), biases=(False, False), ranks=(16, 16), noted=True), dtype)


def test_gradients_of_one_product_are_parts_of_it_that_do_not_overlap() -> None:
    """Those of A, which one GEMM gives for all adapters; as torch.cat gives its inputs parts of one gradient."""
    made = operation((True, True, True))
    leaves = [None if x is None else x.requires_grad_() for x in made.draw((5, 100), torch.float32)]
    wanted = [x for x in leaves if x is not None]
    before = [x.detach().clone() for x in wanted]
    grads = torch.autograd.grad(made.ours(*leaves).sum(), wanted)
    assert all(map(torch.equal, wanted, before))
    memory = sorted((x.data_ptr(), x.data_ptr() + x.numel() * x.itemsize) for x in (*wanted, *grads))
    assert all(x.is_contiguous() for x in grads)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(memory))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.sampled_from([1, 2, 7, 8, 16, 64, 256]), min_size=3, max_size=3).map(tuple),
    adapted=st.lists(st.booleans(), min_size=1, max_size=3).map(tuple),
    biases=st.lists(st.booleans(), min_size=3, max_size=3).map(tuple),
    dropout=st.lists(st.sampled_from([0.0, 0.05, 0.9]), min_size=3, max_size=3).map(tuple),
    rows=st.integers(1, 40),
    hidden=st.sampled_from([1, 3, 16, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_adapters(
    ranks: Any, adapted: Any, biases: Any, dropout: Any, rows: int, hidden: int, dtype: torch.dtype
) -> None:
    checks.check_shape(operation(adapted, dropout, biases, ranks), dtype, (rows, hidden))


def check_kept(linear_package: ModuleType) -> None:
    """Of 64 numbers a row, neither a mask nor a copy: x, p, and parameters."""
    made = operation((True, True), (0.5, 0.5), biases=(False, False), linear_package=linear_package)
    leaves = [None if x is None else x.requires_grad_() for x in made.draw((100, 64), torch.float32)]
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        made.ours(*leaves)
    parameters = {leaf.untyped_storage().data_ptr() for leaf in leaves[1:] if leaf is not None}
    rows = {address: tensor for address, tensor in kept.items() if address not in parameters}
    assert sum(tensor.numel() for tensor in rows.values()) == 100 * (64 + RANKS[0] + RANKS[1])


def test_what_is_kept_does_not_depend_on_dropout() -> None:
    check_kept(package)


def check_masks(linear_package: ModuleType, rows: int = 400) -> None:
    """Each adapter drops elements of its own with its probability, the same in backward, and others in the next call."""
    hidden, probability = 50, 0.2
    ones, zeros = torch.ones(rows, hidden), torch.zeros(hidden, hidden)
    adapters = [
        Adapter(torch.eye(hidden).requires_grad_(), torch.eye(hidden), Form(1.0, probability)) for _ in range(2)
    ]

    def call() -> tuple[torch.Tensor, ...]:
        x = ones.clone().requires_grad_()
        outputs = linear_package.linears(x, [zeros, zeros], [None, None], adapters=adapters)
        before = torch.get_rng_state()
        grads = [torch.autograd.grad(output.sum(), x, retain_graph=True)[0] for output in outputs]
        assert torch.equal(torch.get_rng_state(), before), "backward moves the random numbers on"
        for output, grad, adapter in zip(outputs, grads, adapters, strict=True):
            assert torch.equal(output, grad), "backward drops other elements"
            torch.testing.assert_close(
                torch.autograd.grad(output.sum(), adapter.a_RH, retain_graph=True)[0], output.sum(0).expand(hidden, -1)
            )
        return outputs

    first, second = call()
    for dropped in (first, second):
        assert set(dropped.unique().tolist()) == {0.0, 1.25}
        assert abs((dropped == 0).float().mean().item() - probability) < 5 * (0.16 / dropped.numel()) ** 0.5
    both = ((first == 0) & (second == 0)).float().mean().item()
    assert abs(both - probability**2) < 5 * (0.04 / first.numel()) ** 0.5, "the masks are not independent"
    assert not torch.equal(call()[0], first), "the same mask again"


def test_masks() -> None:
    torch.manual_seed(0)
    check_masks(package)


def test_the_masks_are_those_of_torchs_dropout() -> None:
    x, weight, a = torch.randn(7, 6), torch.zeros(6, 6), torch.eye(6)
    torch.manual_seed(3)
    (found,) = package.linears(x, [weight], [None], adapters=[Adapter(a, a, Form(1.0, 0.3))])
    torch.manual_seed(3)
    torch.testing.assert_close(found, torch.nn.functional.dropout(x, 0.3))


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (
            Adapter(torch.ones(2, 5), torch.ones(4, 2), Form(1.0)),
            r"shapes \(2, 5\) and \(4, 2\), expected \[R, 6\] and \[4, R\]",
        ),
        (Adapter(torch.ones(2, 6), torch.ones(4, 3), Form(1.0)), r"A is \(2, 6\) torch.float32 and its B \(4, 3\)"),
        (Adapter(torch.ones(2, 6), torch.ones(4, 2).double(), Form(1.0)), "expected one rank and dtype"),
        (Adapter(torch.ones(2, 6), torch.ones(4, 2), Form(1.0, -0.1)), "dropout -0.1, expected 0 to 1"),
    ],
    ids=["sizes", "ranks", "dtypes", "dropout"],
)
def test_errors_say_what_came(adapter: Adapter, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        package.linears(torch.ones(3, 6), [torch.ones(4, 6)], [None], adapters=[adapter])


def in_force(check: Any, mutant: Mutant, tmp_path: Path) -> None:
    """The check with a mutant of the low-rank part in it, or of the host code."""

    def mutated(found: ModuleType) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(eager, "low_rank", sys.modules["automodel_accel.kernels.lora.eager"])
            check(found if "linear" in mutant.file else package)

    check_caught(mutant, mutated, tmp_path)


@pytest.mark.parametrize("mutant", VALUES, ids=lambda mutant: mutant.why)
def test_mutants_of_values_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    def check(found: ModuleType) -> None:
        for dropout in ((0.0, 0.0, 0.0), (0.5, 0.0, 0.5)):
            made = operation((True, True, True), dropout, linear_package=found)
            checks.check_shape(made, torch.float32, (3, 7))
            checks.check_frozen_inputs(made, torch.float32) if dropout[0] else None

    in_force(check, mutant, tmp_path)


@pytest.mark.parametrize("mutant", MASKS, ids=lambda mutant: mutant.why)
def test_mutants_of_masks_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    torch.manual_seed(0)
    in_force(check_masks, mutant, tmp_path)


@pytest.mark.parametrize("mutant", KEPT, ids=lambda mutant: mutant.why)
def test_mutants_of_what_is_kept_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    in_force(check_kept, mutant, tmp_path)
