"""linear_cross_entropy against its definition: values, gradients, memory, properties, and mistakes that must be caught.

In float32, ours and torch are both wrong by a few roundings, which sums over the vocabulary and the tokens magnify alike: where
few numbers are compared, it is chance which of the two is off by more. There, larger problems are drawn, and judged as one.
"""

import itertools
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_accel.kernels import linear_cross_entropy as package
from automodel_accel.kernels.contract import implementation_module
from tests.ops import checks
from tests.ops.allocations import Allocations
from tests.ops.mutants_linear_cross_entropy import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated

IMPLEMENTATIONS = package.KERNEL.names()
VOCAB = 61
IGNORED = -100
Options = Mapping[str, Any]


def operation(
    implementation: str,
    vocab: int = VOCAB,
    bias: bool = True,
    ignored: float = 0.25,
    tested: ModuleType = package,
    workspace_bytes: int | None = None,
    valid_rows: int | None = None,
    **options: Any,
) -> checks.Operation:
    """linear_cross_entropy of (hidden [..., H], weight, bias, target), with all else fixed."""
    ignore_index = options.get("ignore_index", IGNORED)

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        hidden = checks.normal(generator, shape, dtype)
        weight = checks.normal(generator, (vocab, shape[-1]), dtype) * shape[-1] ** -0.5
        target = torch.randint(vocab, (math.prod(shape[:-1]),), generator=generator)
        dropped = torch.rand(target.shape, generator=generator) < ignored
        dropped[:1] = False  # a mean over no target has a test of its own
        target = target.masked_fill(dropped, ignore_index)
        return hidden, weight, checks.normal(generator, (vocab,), dtype) if bias else None, target

    def ours(hidden: torch.Tensor, weight: torch.Tensor, b: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
        own = {"workspace_bytes": workspace_bytes, "valid_rows": valid_rows, "implementation": implementation}
        loss = tested.linear_cross_entropy(hidden.flatten(0, -2), weight, target, bias=b, **own, **options)
        assert isinstance(loss, torch.Tensor)
        return loss

    def theirs(hidden: torch.Tensor, weight: torch.Tensor, b: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
        return package.reference.linear_cross_entropy(hidden.flatten(0, -2), weight, target, b, **options)

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs)


def check_values(one: checks.Operation, dtype: torch.dtype) -> None:
    """Values at a shape that is large enough for the dtype; see the top."""
    if dtype == torch.float32:
        checks.check_shape(one, dtype, (32, 64), draws=3)
    else:
        checks.check_shape(one, dtype, (9, 16), draws=2)


TWO_ROWS = 2 * VOCAB * 4  # bytes, in float32; four rows in a dtype half as wide
EVERYTHING: Options = {"scale": -1.5, "softcap": 3.0, "label_smoothing": 0.1, "reduction": "none"}
OPTIONS: Mapping[str, Options] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "no bias": {"bias": False},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "smoothing": {"label_smoothing": 0.2},
    "smoothed evenly": {"label_smoothing": 1.0, "reduction": "sum"},
    "everything": EVERYTHING,
    "a class ignored": {"ignore_index": 3},
    "num_items": {"num_items": 5},
    "num_items on the device": {"num_items": torch.tensor(7, device=checks.DEVICE)},
    "a row a chunk": {"workspace_bytes": 1},
    "two rows a chunk": {"workspace_bytes": TWO_ROWS, **EVERYTHING},
    "a bound": {"valid_rows": 32},
    "a bound, two rows a chunk": {"valid_rows": 40, "workspace_bytes": TWO_ROWS, "reduction": "sum"},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(implementation: str, dtype: torch.dtype, options: Options) -> None:
    check_values(operation(implementation, **options), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab", [1, 2, 63, 1000, 4097])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["mean", "everything"])
def test_shapes(implementation: str, vocab: int, options: Options) -> None:
    one = operation(implementation, vocab, **options)
    check_values(one, torch.float32)
    for rows in (0, 1, 7):
        checks.check_shape(one, torch.bfloat16, (rows, 8), draws=2)


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(
    implementation=st.sampled_from(IMPLEMENTATIONS),
    shape=st.tuples(st.integers(0, 9), st.integers(1, 20)),
    vocab=st.integers(2, 2100),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    bias=st.booleans(),
    scale=st.sampled_from((1.0, 0.25, -2.0)),
    softcap=st.sampled_from((None, 1.5, 30.0)),
    label_smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    reduction=st.sampled_from(package.REDUCTIONS),
    workspace_bytes=st.one_of(st.none(), st.integers(1, 20_000)),
)
def test_drawn(implementation: str, shape: tuple[int, int], vocab: int, dtype: torch.dtype, **options: Any) -> None:
    checks.check_shape(operation(implementation, vocab, **options), dtype, shape, draws=1)


EXACT: tuple[checks.Check, ...] = (
    checks.check_nothing_overwritten,
    checks.check_backward_twice,
    checks.check_repeatable,
    checks.check_double_backward,
)
JUDGED: tuple[checks.Check, ...] = (checks.check_magnitudes, checks.check_frozen_inputs)
NONE_IGNORED: Options = {"ignored": 0.0}  # torch lets NaN pass through an ignored token; ours does not
PROPERTIES: tuple[tuple[str, Options, tuple[checks.Check, ...]], ...] = (
    ("mean", {}, (*EXACT, *JUDGED)),
    ("two rows a chunk", {**OPTIONS["softcap"], "workspace_bytes": TWO_ROWS}, EXACT),
    ("none", {"reduction": "none"}, (*EXACT, *JUDGED, checks.check_layouts)),
    ("everything", {**NONE_IGNORED, **EVERYTHING}, (*JUDGED, checks.check_layouts, checks.check_not_finite)),
    ("mean, none ignored", NONE_IGNORED, (checks.check_not_finite,)),
)
CASES = [pytest.param(options, check, id=f"{check.__name__}: {name}") for name, options, some in PROPERTIES for check in some]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("options", "check"), CASES)
def test_properties(implementation: str, options: Options, check: checks.Check) -> None:
    for dtype in checks.DTYPES if check in EXACT else (torch.bfloat16, torch.float16):
        check(operation(implementation, **options), dtype)


def check_rows(module: ModuleType, dtype: torch.dtype, vocab: int, softcap: float | None, smoothing: float) -> None:
    """An implementation's own functions on rows of logits that a head hardly gives: huge, equal, infinite, NaN; ignored."""
    nan, inf = float("nan"), float("inf")
    generator = torch.Generator().manual_seed(0)
    z = checks.normal(generator, (12, vocab), dtype).to(checks.DEVICE)
    z[1] *= 1e4 / z[1].abs().max()
    z[2] = 1e4
    z[3, ::2] = -inf
    z[4] = -inf
    z[5, vocab // 2] = inf
    z[6, vocab - 1] = nan
    z[7], z[8] = nan, inf
    target = torch.randint(vocab, (12,), generator=generator).to(checks.DEVICE)
    target[3] = 2 * (target[3] // 2)  # a class of probability 0
    target[7:10] = IGNORED
    weight = checks.normal(generator, (12,), torch.float32).to(checks.DEVICE)
    form = (0.7, softcap, IGNORED, smoothing)

    def theirs(x: torch.Tensor) -> list[torch.Tensor]:
        x = x.masked_fill((target == IGNORED)[:, None], 0.0).requires_grad_()
        logits = x.to(torch.promote_types(x.dtype, torch.float32)) * form[0]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        loss = F.cross_entropy(logits, target, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none")
        return [loss.detach(), *torch.autograd.grad(loss, x, weight.to(loss.dtype))]

    padded = z.new_full((2, 12, -(-vocab // 16) * 16), nan)[..., :vocab].copy_(z)
    loss = module.backward(padded[0], target, weight, *form)
    assert torch.equal(module.forward(padded[1], target, *form).nan_to_num(3.0), loss.nan_to_num(3.0))
    assert not padded[0, 7:10].any(), "the gradient of an ignored row is not zero"
    ours = [loss, padded[0]]
    results = zip(("loss", "gradient"), ours, theirs(z), theirs(z.double()), strict=True)
    checks.judge_results([[checks.Result(*result) for result in results]])


FORMS = ((None, 0.0), (None, 0.2), (5.0, 0.0), (5.0, 0.2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [100, 2051])
def test_rows(implementation: str, dtype: torch.dtype, vocab: int) -> None:
    for form in FORMS:
        check_rows(_module(implementation, dtype), dtype, vocab, *form)


def _module(implementation: str, dtype: torch.dtype = torch.float32, tested: ModuleType = package) -> ModuleType:
    module: ModuleType = implementation_module(tested.KERNEL, checks.DEVICE, dtype, VOCAB, implementation)
    return module


def check_target_out_of_range(module: ModuleType) -> None:
    """On a GPU, where no error can be raised in time, a target that is no class makes loss and gradient NaN."""
    z = torch.randn(5, 100, device=checks.DEVICE)
    target = torch.tensor([3, 100, -1, 2**40, 99], device=checks.DEVICE)
    loss = module.backward(z, target, torch.ones(5, device=checks.DEVICE), 1.0, None, IGNORED, 0.0)
    wrong = torch.tensor([False, True, True, True, False], device=checks.DEVICE)
    assert torch.equal(loss.isnan(), wrong)
    assert torch.equal(z.isnan().all(1), wrong)
    assert torch.equal(z.isnan().any(1), wrong)


def test_target_out_of_range_where_the_host_does_not_look() -> None:
    check_target_out_of_range(_module("triton"))


def check_scale(module: ModuleType) -> None:
    """In place, rounded once, by one for all dtypes; longer than a block, and no multiple of it."""
    for dtype, factor in itertools.product(checks.DTYPES, (1.0, 0.3, -2.0, float("nan"))):
        x = checks.normal(torch.Generator().manual_seed(0), (3, 5000), dtype).to(checks.DEVICE)
        expected = (x.float() * factor).to(dtype)
        module.scale_(x, torch.tensor(factor, device=checks.DEVICE))
        assert torch.equal(x.nan_to_num(), expected.nan_to_num())
        assert torch.equal(x.isnan(), expected.isnan())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scale(implementation: str) -> None:
    check_scale(_module(implementation))


def _loss_and_gradients(implementation: str, tested: ModuleType = package, **options: Any) -> list[torch.Tensor]:
    one = operation(implementation, tested=tested, **options)
    return checks.differentiate(one.ours, one.draw((9, 16), torch.float32), [0, 1, 2])


def check_all_ignored(implementation: str, tested: ModuleType = package) -> None:
    """As in torch, the mean of nothing is NaN and the sum 0, and the gradients are zero; dropped or not."""
    hidden, weight, bias, target = operation(implementation).draw((5, 16), torch.float32)
    assert target is not None
    for reduction, smoothing, valid_rows in itertools.product(package.REDUCTIONS, (0.0, 0.1), (None, 0, 5)):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        one = operation(implementation, tested=tested, valid_rows=valid_rows, **options)
        inputs = (hidden, weight, bias, torch.full_like(target, IGNORED))
        ours, theirs = (checks.differentiate(function, inputs, [0, 1, 2]) for function in (one.ours, one.theirs))
        for mine, expected in zip(ours, theirs, strict=True):
            assert torch.equal(mine.nan_to_num(3.0), expected.nan_to_num(3.0)), options


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_ignored(implementation: str) -> None:
    check_all_ignored(implementation)


def check_ignored_rows(implementation: str, tested: ModuleType = package) -> None:
    """NaN in the hidden state of an ignored token reaches nothing, and its gradient is zero."""
    one = operation(implementation, tested=tested)
    hidden, weight, bias, target = one.draw((9, 16), torch.float32)
    assert hidden is not None
    assert target is not None
    ignored = target == IGNORED
    assert ignored.any()
    poisoned = hidden.masked_fill(ignored[:, None], float("nan") if checks.DEVICE == "cpu" else 1e4)
    clean = checks.differentiate(one.ours, (hidden, weight, bias, target), [0, 1, 2])
    ours = checks.differentiate(one.ours, (poisoned, weight, bias, target), [0, 1, 2])
    assert all(map(torch.equal, ours, clean))
    assert not ours[1][ignored].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ignored_rows(implementation: str) -> None:
    check_ignored_rows(implementation)


def check_bits(implementation: str, tested: ModuleType = package) -> None:
    """Results that must agree bit for bit: frozen inputs, factors that are powers of two, an int or a tensor, in parts."""
    one = operation(implementation, tested=tested)
    inputs = one.draw((9, 16), torch.float32)
    whole = _loss_and_gradients(implementation, tested)
    for count in range(3):
        for wanted in itertools.combinations(range(3), count):
            some = checks.differentiate(one.ours, inputs, wanted)
            assert all(map(torch.equal, some, [whole[0], *(whole[1 + i] for i in wanted)])), wanted
    unit = checks.differentiate(one.ours, inputs, [0, 1, 2], torch.ones((), device=checks.DEVICE))
    quarter = checks.differentiate(one.ours, inputs, [0, 1, 2], torch.tensor(0.25, device=checks.DEVICE))
    assert all(torch.equal(a * 0.25, b) for a, b in zip(unit[1:], quarter[1:], strict=True))
    count_5 = _loss_and_gradients(implementation, tested, num_items=5)
    tensor_5 = _loss_and_gradients(implementation, tested, num_items=torch.tensor(5, device=checks.DEVICE))
    assert all(map(torch.equal, count_5, tensor_5))
    leaves = [x.detach().requires_grad_() for x in inputs[:3] if x is not None]
    loss = one.ours(*leaves, inputs[3])
    grad_output = torch.full_like(loss, 0.25)
    parts = [torch.autograd.grad(loss, leaf, grad_output, retain_graph=True)[0] for leaf in leaves]
    assert all(map(torch.equal, parts, quarter[1:])), "asked for one gradient at a time"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bits(implementation: str) -> None:
    check_bits(implementation)


def check_memory(implementation: str, tested: ModuleType = package) -> None:
    """Beyond a chunk of logits, the only large memory is one gradient of the weight, which becomes `.grad` itself."""
    rows, hidden_size, vocab, chunk_rows = 64, 32, 512, 4
    chunk_bytes, weight_bytes = chunk_rows * vocab * 4, vocab * hidden_size * 4
    for frozen, reduction, grad_output in itertools.product((False, True), package.REDUCTIONS, (1.0, 0.5)):
        one = operation(
            implementation, vocab, tested=tested, workspace_bytes=chunk_bytes, reduction=reduction, ignored=0.0
        )
        hidden, weight, bias, target = one.draw((rows, hidden_size), torch.float32)
        assert hidden is not None
        assert weight is not None
        hidden.requires_grad_()
        weight.requires_grad_(not frozen)
        with Allocations() as allocations:
            loss = one.ours(hidden, weight, bias, target)
            loss.backward(torch.full_like(loss, grad_output))  # type: ignore[no-untyped-call]
        large = sorted((size for size in allocations.sizes if size >= chunk_bytes), reverse=True)
        chunks = 2 if reduction == "none" else 1  # for "none", backward has one of its own
        hidden_gradients = [size for size in large if size == rows * hidden_size * 4]
        large = [size for size in large if size != rows * hidden_size * 4]
        assert len(hidden_gradients) <= 1
        assert large == [weight_bytes] * (not frozen) + [chunk_bytes] * chunks, (frozen, reduction)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_memory(implementation: str) -> None:
    check_memory(implementation)


@pytest.mark.parametrize("grad", [True, False])
def test_only_losses_where_nothing_needs_a_gradient(grad: bool) -> None:
    one = operation("torch")
    hidden, *others = one.draw((9, 16), torch.float32)
    assert hidden is not None
    with torch.set_grad_enabled(grad), Allocations() as allocations:
        loss = one.ours(hidden.requires_grad_(not grad), *others)
    assert not loss.requires_grad
    assert [name for name in allocations.operations if "mm" in name] == ["aten.addmm.out"]


def test_gradients_by_finite_differences() -> None:
    for options in ({}, EVERYTHING, OPTIONS["two rows a chunk"], OPTIONS["a class ignored"]):
        one = operation("torch", 7, **options)
        *floats, target = one.draw((5, 3), torch.float64)
        leaves = tuple(x.requires_grad_() for x in floats if x is not None)
        assert torch.autograd.gradcheck(lambda *x: one.ours(*x, target), leaves)  # noqa: B023


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"bias": False, "num_items": 3}], ids=["mean", "none", "num_items"])
def test_compiled(implementation: str, options: Options) -> None:
    checks.check_compiled(operation(implementation, **options))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", package.REDUCTIONS)
@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, False, False]], ids=str)
def test_registered(implementation: str, reduction: str, needs: list[bool]) -> None:
    *floats, target = operation(implementation).draw((5, 16), torch.float32)
    inputs = [x.requires_grad_(need) for x, need in zip(floats, needs, strict=True) if x is not None]
    options = (1.5, 3.0, IGNORED, 0.1, reduction, None, None, implementation, needs)
    torch.library.opcheck(torch.ops.automodel_accel.linear_cross_entropy.default, (*inputs, target, None, *options))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_functorch_is_right_or_refused(implementation: str) -> None:
    checks.check_functorch(operation(implementation, ignored=0.0, reduction="none"))


def check_autocast(implementation: str, tested: ModuleType = package) -> None:
    """Autocast, inside whose region a model computes its loss, changes nothing: the tensors' dtype is what counts."""
    with torch.autocast(checks.DEVICE, torch.bfloat16):
        inside = _loss_and_gradients(implementation, tested)
    assert all(map(torch.equal, inside, _loss_and_gradients(implementation, tested)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(implementation: str) -> None:
    check_autocast(implementation)


@pytest.mark.parametrize(
    ("tokens", "vocab", "dtype", "workspace", "device", "expected"),
    [
        (4096, 128256, torch.bfloat16, None, "meta", 1024),  # 256 MiB hold 1046
        (4097, 128256, torch.bfloat16, None, "meta", 1025),  # evenly, no chunk of a few rows
        (8192, 256000, torch.bfloat16, None, "meta", 1024),  # never shorter on a GPU
        (65536, 1000, torch.bfloat16, None, "meta", 4096),
        (2**18, 128256, torch.bfloat16, None, "meta", 8192),  # 32 chunks in a 16-bit dtype
        (2**18, 128256, torch.float32, None, "meta", 1024),
        (4096, 128256, torch.float32, None, "cpu", 256),  # 128 MiB hold 261
        (10, 128256, torch.float32, None, "cpu", 10),
        (10, 100, torch.float32, 1200, "cpu", 3),
        (10, 100, torch.float32, 1, "meta", 1),
        (0, 100, torch.float32, None, "cpu", 1),
    ],
)
def test_length_of_chunks(
    tokens: int, vocab: int, dtype: torch.dtype, workspace: int | None, device: str, expected: int
) -> None:
    assert package._chunk_rows(tokens, vocab, torch.empty(0, dtype=dtype, device=device), workspace) == expected


def test_a_bound_that_is_too_low_is_never_silent() -> None:
    hidden, weight, _, target = operation("torch", ignored=0.0).draw((5, 16), torch.float32)
    assert target is not None
    with pytest.raises(ValueError, match="5 targets count, but valid_rows promises at most 4"):
        package.linear_cross_entropy(hidden, weight, target, valid_rows=4)
    for bound, lost in ((4, True), (5, False)):  # on a GPU
        options = package._Options(1.0, None, IGNORED, 0.0, "mean", bound, None, "torch", [True] * 3)
        assert package._divisor(target, None, options, torch.float32).isnan().item() == lost


WRONG: tuple[tuple[Options, str], ...] = (
    ({"hidden": torch.ones(2, 3, 8)}, r"hidden is \(2, 3, 8\) torch.float32 on cpu, expected \[N, H\]; flatten"),
    ({"weight": torch.ones(7, 9)}, r"weight is \(7, 9\) .*, expected \(V, 8\) torch.float32 on cpu"),
    ({"weight": torch.ones(7, 8).bfloat16()}, r"weight is .* torch.bfloat16 .*, expected \(V, 8\) torch.float32"),
    ({"bias": torch.ones(8)}, r"bias is \(8,\) .*, expected \(7,\)"),
    ({"target": torch.ones(4, dtype=torch.int64)}, r"target is \(4,\) torch.int64 .*, expected \(3,\) torch.int64"),
    ({"target": torch.ones(3, dtype=torch.int32)}, r"target is .* torch.int32 .*, expected \(3,\) torch.int64"),
    ({"target": torch.tensor([1, 7, 2])}, "target 7 is no class; expected 0 to 6, or ignore_index=-100"),
    ({"target": torch.tensor([1, -1, 2])}, "target -1 is no class"),
    ({"reduction": "avg"}, "reduction 'avg' is unknown"),
    ({"softcap": 0.0}, "softcap is 0.0, expected a positive number"),
    ({"label_smoothing": 1.5}, "label_smoothing is 1.5, expected a share"),
    ({"num_items": 3, "reduction": "sum"}, "num_items divides a mean, but reduction is 'sum'"),
    ({"num_items": 0}, "num_items is 0, expected at least 1"),
    ({"num_items": torch.ones(2)}, r"num_items has shape \(2,\), expected an int or a 0-d tensor"),
    ({"valid_rows": -1}, "valid_rows is -1"),
    ({"workspace_bytes": 0}, "workspace_bytes is 0, expected at least 1"),
    ({"implementation": "tritn"}, "Did you mean 'triton'"),
)


@pytest.mark.skipif(checks.DEVICE != "cpu", reason="a GPU does not wait for the host, and the tensors are on the CPU")
@pytest.mark.parametrize(("change", "sentence"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_refused_with_a_sentence(change: Options, sentence: str) -> None:
    arguments = {"hidden": torch.ones(3, 8), "weight": torch.ones(7, 8), "target": torch.tensor([0, IGNORED, 6])}
    package.linear_cross_entropy(**arguments)
    with pytest.raises(ValueError, match=sentence):
        package.linear_cross_entropy(**{**arguments, **change})


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    hidden, weight, bias, target = operation("triton").draw((64, 32), torch.bfloat16)
    options: Options = {"valid_rows": 64, "num_items": torch.tensor(7, device="cuda"), "workspace_bytes": 4 * VOCAB * 2}
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    one = operation("triton", **options)
    one.ours(*leaves, target).backward()  # type: ignore[no-untyped-call]  # loads and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.ours(*leaves, target).backward()  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_package(implementation: str, tested: ModuleType) -> None:
    """What a mutant must not survive: every branch and every property, once."""
    for dtype, (softcap, smoothing) in zip((torch.bfloat16, torch.float32) * 2, FORMS, strict=True):
        check_rows(_module(implementation, dtype, tested), dtype, 2051 if implementation == "triton" else 100, softcap, smoothing)
    check_scale(_module(implementation, tested=tested))
    if implementation == "triton":
        check_target_out_of_range(_module(implementation, tested=tested))
    for options in OPTIONS.values():
        checks.check_shape(operation(implementation, tested=tested, **options), torch.bfloat16, (9, 16), draws=1)
    checks.check_shape(operation(implementation, tested=tested), torch.float16, (9, 16), draws=1)
    for check in (check_ignored_rows, check_all_ignored, check_bits, check_memory, check_autocast):
        check(implementation, tested)
    for check in EXACT:
        check(operation(implementation, tested=tested), torch.float32)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    implementation = "triton" if "fused" in mutant.file else "torch"
    check_caught(mutant, partial(check_package, implementation), tmp_path)


@pytest.mark.parametrize("file", ["fused.py", "eager.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"linear_cross_entropy/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as tested:
        check_package("triton" if file == "fused.py" else "torch", tested)
