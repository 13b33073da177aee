"""Adapters in Triton, with and without columns beside weights and input: values, gradients, masks, passes over the output, mistakes."""

import functools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

pytest.importorskip("triton")

from automodel_accel.kernels import linear as package
from automodel_accel.kernels import room
from automodel_accel.kernels.linear import fused as products
from automodel_accel.kernels.linear import reference
from automodel_accel.kernels.lora import Adapter, Form, fused
from automodel_accel.kernels.lora.extension import can_extend, contract, extend, padded
from automodel_accel.kernels.recompute import remember, source_of
from tests.budgets.watch import Launch, Watch
from tests.ops import checks
from tests.ops.mutants_lora_fused import MASKS, VALUES
from tests.ops.mutation import Mutant, check_caught
from tests.ops.test_lora import check_masks

WIDTHS, RANKS, SCALE = (70, 8, 3, 4), (3, 2, 17, 4), 0.7  # more rows of a B than one program copies
# how torch's GEMM sums depends on the layout; where it rounds, on the order of the sum
PROPERTIES = tuple(check for check in checks.PROPERTIES if check not in (checks.check_layouts, checks.check_rounding))


def made(
    adapted: tuple[bool, ...] = (True, False, True),
    dropout: tuple[float, ...] = (0.0, 0.0, 0.0),
    biases: tuple[bool, ...] = (True, False, True),
    ranks: tuple[int, ...] = RANKS,
    *,
    wide: bool = True,
    noted: bool = False,
    low: torch.dtype | None = None,
    linear_package: ModuleType = package,
) -> checks.Operation:
    """Linears of one input, some adapted, all outputs in a row; wide: from an input with room, and frozen weights with columns."""
    count = len(adapted)

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        def draw(*size: int, of: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
            return checks.normal(generator, size, torch.float32).mul_(scale).to(of)

        x, small = draw(*shape), shape[-1] ** -0.5
        sizes = list(zip(WIDTHS, ranks, adapted, strict=False))
        a = [draw(rank, shape[-1], of=low or dtype, scale=small) if one else None for _, rank, one in sizes]
        b = [draw(width, rank, of=low or dtype) if one else None for width, rank, one in sizes]
        vectors = [draw(width) if wanted else None for width, wanted in zip(WIDTHS[:count], biases, strict=False)]
        weights = [] if wide else [draw(width, shape[-1], scale=small) for width in WIDTHS[:count]]
        return x, *vectors, *a, *b, *weights

    def parts(rest: tuple[Any, ...], x: torch.Tensor) -> tuple[Any, Any, list[Adapter | None]]:
        vectors, a, b, weights = (rest[start : start + count] for start in range(0, 4 * count, count))
        if wide:  # frozen: multiples of a power of 2, the same in every dtype
            drawn = torch.Generator().manual_seed(3)
            shapes = [(width, x.shape[-1]) for width in WIDTHS[:count]]
            weights = tuple((torch.randint(-4, 5, shape, generator=drawn) / 8).to(x) for shape in shapes)
        pairs = zip(a, b, dropout, strict=False)
        return weights, vectors, [None if one is None else Adapter(one, two, Form(SCALE, p)) for one, two, p in pairs]

    def joined(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([output.flatten() for output in outputs])

    def ours(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        weights, vectors, adapters = parts(rest, x)
        torch.manual_seed(0)
        if wide:
            weights, adapters = with_columns(weights, adapters)
        y = x * 1 if noted else x
        y = with_room(y, 64) if wide else y
        if noted:
            remember(y, lambda saved: saved * 1, x)
        named: dict[str, Any] = {"adapters": adapters, "implementation": "triton", "source": source_of(y)}
        return joined(linear_package.linears(y, weights, vectors, **named))

    def theirs(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        weights, vectors, adapters = parts(rest, x)
        torch.manual_seed(0)
        seed = fused.draw_seed(x.device)
        lots = [sum(adapted[:i]) for i in range(count)]
        masks = [
            fused.mask(x.detach().float(), *at, seed) if at[1] else None for at in zip(lots, dropout, strict=False)
        ]
        return joined(reference.linears(x, weights, vectors, adapters=adapters, masks=masks))

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs)


def with_columns(weights: Any, adapters: list[Adapter | None]) -> tuple[list[Any], list[Any]]:
    """Frozen parameters with columns for the adapters' B."""
    widths = [0 if one is None else padded(one.a_RH.shape[0]) for one in adapters]
    frozen = [nn.Parameter(weight.clone(), requires_grad=False) for weight in weights]
    extended = [
        one and Adapter(one.a_RH, one.b_FR, one.form, extend(weight, sum(widths), sum(widths[:i])))
        for i, (one, weight) in enumerate(zip(adapters, frozen, strict=True))
    ]
    return frozen, extended


def with_room(x: torch.Tensor, columns: int) -> torch.Tensor:
    """The same values in rows further apart, as a producer leaves room; what lies there is not a number."""
    y = F.pad(x, (0, columns), value=float("nan"))[..., : x.shape[-1]]
    room.mark(y)
    return y


NONE, SOME = (0.0, 0.0, 0.0), (0.5, 0.0, 0.25)
CALLS: dict[str, Any] = {
    "one": ((True,), NONE, {}),
    "three": ((True, True, True), NONE, {"wide": False}),
    "one without": ((True, False, True), NONE, {"noted": True}),
    "one without, dropout": ((False, True, True), SOME, {}),
    "three, dropout": ((True, True, True), SOME, {"noted": True}),
    "three, dropout, without columns": ((True, True, True), SOME, {"wide": False, "noted": True}),
}


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_values(name: str, dtype: torch.dtype) -> None:
    adapted, dropout, layout = CALLS[name]
    checks.check_shape(made(adapted, dropout, **layout), dtype, (2, 20, 70), draws=4)


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "plain"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (65, 5), (0, 8), (9,)], ids=str)
def test_odd_shapes(shape: tuple[int, ...], wide: bool) -> None:
    operation = made((True, False, True, True), (1.0, 0.5, 0.0, 0.5), (True, False, True, False), wide=wide)
    checks.check_shape(operation, torch.float32, shape)


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_properties(check: checks.Check) -> None:
    # of small ranks a gradient has so few elements that chance would decide
    # of adapters side by side, what is not finite: see below; a set of frozen inputs after the other is slow to interpret
    if check not in (checks.check_not_finite, checks.check_frozen_inputs):
        check(made((True, True), biases=(True, False), ranks=(16, 16)), torch.float32)
    check(made((True, False), (0.5, 0.0), (False, False), (16, 16), wide=False, noted=True), torch.bfloat16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_in_one_adapter_is_so_in_all_outputs_of_the_input(bad: float) -> None:
    """The zeros beside the other weights do not hide it: a step that PEFT would lose is lost, and no other."""
    draw = made((True, True), biases=(False, False)).draw((5, 16), torch.float32)
    ours = made((True, True), biases=(False, False)).ours
    assert ours(*draw).isfinite().all()
    for i, x in enumerate(draw):
        if x is not None:
            spoilt = [
                y if y is None or i != j else y.clone().index_fill_(-1, torch.tensor([0]), bad)
                for j, y in enumerate(draw)
            ]
            assert not ours(*spoilt).isfinite().all(), f"input {i}"


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])  # the interpreter is slow to shrink
@given(
    ranks=st.lists(st.sampled_from([1, 2, 7, 8, 16, 64, 256]), min_size=4, max_size=4).map(tuple),
    adapted=st.lists(st.booleans(), min_size=1, max_size=4).filter(any).map(tuple),
    biases=st.lists(st.booleans(), min_size=4, max_size=4).map(tuple),
    dropout=st.lists(st.sampled_from([0.0, 0.05, 0.9]), min_size=4, max_size=4).map(tuple),
    rows=st.integers(10, 40),
    hidden=st.sampled_from([16, 33, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    wide=st.booleans(),
)
def test_any_adapters(
    ranks: Any, adapted: Any, biases: Any, dropout: Any, rows: int, hidden: int, dtype: torch.dtype, wide: bool
) -> None:
    checks.check_shape(made(adapted, dropout, biases, ranks, wide=wide), dtype, (rows, hidden), draws=3)


IN_TRITON: Any = SimpleNamespace(linears=functools.partial(package.linears, implementation="triton"))


def test_masks() -> None:
    torch.manual_seed(0)
    check_masks(IN_TRITON, rows=150)


def test_masks_of_all_adapters_and_calls_are_independent() -> None:
    """Also those of a fourth and fifth adapter, which another launch draws, and those of seeds that follow one another."""
    torch.manual_seed(0)
    x, p = torch.ones(700, 90), 0.3
    drawn = [
        fused.mask(x, number, p, seed)
        for seed in (fused.draw_seed(x.device), 5 | 1 << 62, 7 | 1 << 62)
        for number in range(5)
    ]
    of_one = 5 * (p * (1 - p) / x.numel()) ** 0.5
    for i, one in enumerate(drawn):
        assert abs(1 - one.mean().item() - p) < of_one
        assert abs((one[:, 1:] * one[:, :-1]).mean().item() - (1 - p) ** 2) < 2 * of_one, "of neighbours"
        for other in drawn[:i]:
            assert abs((one * other).mean().item() - (1 - p) ** 2) < of_one, "of two adapters"
    rows, cols = drawn[0].mean(1), drawn[0].mean(0)
    assert abs(rows.var().item() / (p * (1 - p) / 90) - 1) < 0.3
    assert abs(cols.var().item() / (p * (1 - p) / 700) - 1) < 0.6


def check_kept(linear_package: ModuleType, noted: bool) -> None:
    """x and p, each once; neither a mask nor a copy, nor the room beside x where its source is kept."""
    operation = made((True, True), (0.5, 0.5), (False, False), noted=noted, linear_package=linear_package)
    leaves = [None if x is None else x.requires_grad_() for x in operation.draw((100, 64), torch.float32)]
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        operation.ours(*leaves)
    bytes_of = sorted(tensor.untyped_storage().nbytes() for tensor in kept.values() if tensor.shape[0] == 100)
    of_x, of_p = 64 if noted else 64 + 64, padded(RANKS[0]) + padded(RANKS[1])
    assert bytes_of == sorted([4 * 100 * of_p, 4 * 100 * of_x])


@pytest.mark.parametrize("noted", [False, True])
def test_what_is_kept_does_not_depend_on_dropout(noted: bool) -> None:
    check_kept(package, noted)


def launches(wide: bool, dropout: float) -> tuple[list[Launch], list[Launch]]:
    """Of three linears 64 -> 96 of 40 rows, forward and backward."""
    adapters = [Adapter(torch.randn(8, 64), torch.randn(96, 8), Form(1.0, dropout)) for _ in range(3)]
    for one in adapters:
        one.a_RH.requires_grad_()
        one.b_FR.requires_grad_()
    weights: Any = [torch.randn(96, 64) for _ in adapters]
    x = torch.randn(40, 64).requires_grad_()
    if wide:
        weights, adapters = with_columns(weights, adapters)  # type: ignore[arg-type,assignment]
        x = with_room(x, 24)
    with Watch() as forward:
        outputs = package.linears(x, weights, [None] * 3, adapters=adapters, implementation="triton")
    grads = [torch.ones(40, 96) for _ in outputs]
    with Watch() as backward:
        torch.autograd.backward(outputs, grads, inputs=[one.a_RH for one in adapters] + [one.b_FR for one in adapters])
    return forward.launches, backward.launches


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_pass_over_the_output_but_the_products_own(dropout: float) -> None:
    """Forward: each output is written once, by its GEMM, and read by nobody; dropout costs neither a launch nor a byte."""
    forward = [launch for launch in launches(True, dropout)[0] if launch.name != "randint"]  # of a seed: on a GPU none
    assert [launch.name for launch in forward] == ["project_kernel", "mm", "mm", "mm"]
    rows, hidden, out, columns = 40, 64, 96, 24
    project, *products = forward
    blocks = -(-rows // 16)  # each reads the A, which stay in the cache
    size_a, copied = 4 * 3 * 8 * hidden, 4 * 3 * 8 * out
    assert project.read == 4 * rows * hidden + blocks * size_a + copied
    assert project.written == 2 * 4 * rows * columns + copied
    for product in products:
        assert product.written == 4 * rows * out
        assert product.read == 4 * (rows + out) * (hidden + columns)


def test_without_columns_the_output_is_written_and_read_once_more() -> None:
    forward, _ = launches(False, 0.0)
    assert [launch.name for launch in forward] == ["project_kernel", *["mm", "addmm_"] * 3]


def test_columns_come_and_go_with_the_same_values() -> None:
    weight = nn.Parameter(torch.randn(6, 10), requires_grad=False)
    before = weight.detach().clone()
    assert can_extend(weight)
    extension = extend(weight, 16, 8)
    wide = extension.wide(weight)
    assert wide is not None
    assert wide.shape == (6, 26)
    assert torch.equal(weight, before)
    assert torch.equal(wide[:, 10:], torch.zeros(6, 16))
    version = weight._version
    wide[:, 18:] = 1
    assert weight._version == version, "what is written beside a weight is no change of it"
    assert torch.equal(weight, before)
    assert not can_extend(weight)
    contract(weight)
    assert weight.is_contiguous()
    assert torch.equal(weight, before)
    assert weight.untyped_storage().nbytes() == before.untyped_storage().nbytes()
    assert extension.wide(weight) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: setattr(weight, "data", torch.zeros(6, 26)[:, :10]),
        lambda weight: setattr(weight, "data", weight.detach().clone()),
        lambda weight: setattr(weight, "data", weight.detach().to(torch.float64)),
    ],
    ids=["other memory of that layout", "moved", "another dtype"],
)
def test_columns_of_a_weight_that_was_moved_are_gone(change: Any) -> None:
    weight = nn.Parameter(torch.randn(6, 10), requires_grad=False)
    extension = extend(weight, 16, 0)
    change(weight)
    assert extension.wide(weight) is None


def test_a_weight_that_trains_or_shares_memory_has_no_columns() -> None:
    assert not can_extend(nn.Parameter(torch.randn(6, 10)))
    assert not can_extend(nn.Parameter(torch.randn(7, 10)[:6], requires_grad=False))
    assert not can_extend(nn.Parameter(torch.randn(10, 6).t(), requires_grad=False))
    assert not can_extend(torch.randn(6, 10))
    with torch.device("meta"):
        assert not can_extend(nn.Parameter(torch.empty(6, 10), requires_grad=False))


def test_another_adapter_between_forward_and_backward() -> None:
    """The columns hold the B of the last forward; a backward of an earlier one puts its own back."""
    (weight,), (first,) = with_columns(
        [torch.randn(5, 16)], [Adapter(torch.randn(8, 16), torch.randn(5, 8), Form(1.0))]
    )
    second = Adapter(torch.randn(8, 16), torch.randn(5, 8), Form(1.0), first.extension)
    grads = []
    for others in (False, True):
        x = with_room(torch.ones(4, 16, requires_grad=True), 16)
        (output,) = package.linears(x, [weight], [None], adapters=[first], implementation="triton")
        if others:
            package.linears(x, [weight], [None], adapters=[second], implementation="triton")
        grads.append(torch.autograd.grad(output.sum(), x)[0])
    assert torch.equal(*grads)
    expected = torch.ones(4, 5) @ (weight + first.b_FR @ first.a_RH)
    torch.testing.assert_close(grads[0], expected)


def test_adapters_of_any_layout() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 16), torch.randn(6, 16)
    outcomes = []
    for strided in (False, True):
        torch.manual_seed(1)
        a, b = torch.randn(16, 4).t(), torch.randn(4, 6).t()
        leaves = [(part if strided else part.contiguous()).requires_grad_() for part in (a, b)]
        (output,) = package.linears(
            x, [weight], [None], adapters=[Adapter(*leaves, Form(1.0))], implementation="triton"
        )
        outcomes.append([output, *torch.autograd.grad(output.sum(), leaves)])
    for plain, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(plain, other)


def in_force(check: Any, mutant: Mutant, tmp_path: Path) -> None:
    """The check with a mutant of the kernels in it, of their host code, or of the products."""

    def mutated(_: ModuleType) -> None:
        kernels = sys.modules["automodel_accel.kernels.lora.products_fused"]
        host = sys.modules["automodel_accel.kernels.lora.fused"]
        with pytest.MonkeyPatch.context() as patch:
            for name in ("project_kernel", "grad_a_kernel", "add_grad_input_kernel", "mask_kernel"):
                patch.setattr(fused, name, getattr(kernels, name))
            patch.setattr(products, "fused", host)
            check()

    check_caught(mutant, mutated, tmp_path)


@pytest.mark.parametrize("mutant", VALUES, ids=lambda mutant: mutant.why)
def test_mutants_of_values_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    def check() -> None:
        operation = made((True, True, True, True), (0.0, 0.0, 0.0, 0.5), biases=(False, True, False, False))
        checks.check_shape(operation, torch.float32, (3, 70), draws=1)

    in_force(check, mutant, tmp_path)


@pytest.mark.parametrize("mutant", MASKS, ids=lambda mutant: mutant.why)
def test_mutants_of_masks_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    def check() -> None:
        torch.manual_seed(0)
        check_masks(IN_TRITON, rows=150)
        drawn = [fused.mask(torch.ones(40, 90), number, 0.5, 5 | 1 << 62) for number in range(4)]
        assert not any(torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])

    in_force(check, mutant, tmp_path)
