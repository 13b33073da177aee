"""cross_entropy against its definition: values, gradients, properties, and mistakes that must be caught."""

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
from torch import library

from automodel_accel.kernels import cross_entropy as package
from tests.ops import checks
from tests.ops.allocations import Allocations
from tests.ops.mutants_cross_entropy import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated

IMPLEMENTATIONS = ("triton", "torch")
IGNORED = -100
CLASS = 3  # ignored in one of the cases
Options = Mapping[str, Any]
EVERYTHING: Options = {
    "scale": -1.5,
    "softcap": 3.0,
    "label_smoothing": 0.1,
    "z_loss": 0.02,
    "weighted": True,
    "reduction": "none",
}
OPTIONS: Mapping[str, Options] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "smoothing": {"label_smoothing": 0.2},
    "smoothed evenly": {"label_smoothing": 1.0, "reduction": "none"},
    "z-loss": {"z_loss": 0.1},
    "weighted": {"weighted": True},
    "weighted sum": {"weighted": True, "reduction": "sum", "z_loss": 0.1},
    "everything": EVERYTHING,
    "a class ignored": {"ignore_index": CLASS},
    "num_items": {"num_items": 5, "weighted": True},
    "num_items on the device": {"num_items": torch.tensor(7, device=checks.DEVICE)},
}
SHAPES = ((2, 4, 64), (1, 1), (3, 7), (5, 63), (7, 257), (33, 3), (0, 8), (2, 0, 5), (3, 2051))


def operation(
    implementation: str, tested: ModuleType = package, ignored: float = 0.25, weighted: bool = False, **options: Any
) -> checks.Operation:
    """cross_entropy of (logits [..., V], target), with all else fixed."""
    ignore_index = options.get("ignore_index", IGNORED)

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        target = torch.randint(shape[-1], shape[:-1], generator=generator)
        dropped = torch.rand(target.shape, generator=generator) < ignored
        dropped.view(-1)[:1] = False  # a mean over no target has a test of its own
        return checks.normal(generator, shape, dtype), target.masked_fill(dropped, ignore_index)

    def token_weight(target: torch.Tensor) -> torch.Tensor | None:
        """Different ones, NaN where the token is ignored."""
        spread = (torch.arange(target.numel(), device=target.device) % 5 + 1).view(target.shape) * 0.3
        return torch.where(target == ignore_index, torch.nan, spread) if weighted else None

    def ours(logits: Any, target: Any) -> torch.Tensor:
        own = {"token_weight": token_weight(target), "implementation": implementation}
        loss = tested.cross_entropy(logits, target, **own, **options)
        assert isinstance(loss, torch.Tensor)
        return loss

    def theirs(logits: Any, target: Any) -> torch.Tensor:
        return package.reference.cross_entropy(logits, target, token_weight(target), **options)

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(implementation: str, options: Options) -> None:
    for dtype, rows in ((torch.float32, 24), (torch.bfloat16, 9), (torch.float16, 9)):
        checks.check_shape(operation(implementation, **options), dtype, (rows, 61), draws=2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["mean", "everything"])
def test_shapes(implementation: str, options: Options) -> None:
    for shape in SHAPES:
        if (
            shape[-1] > 1 or not options
        ):  # everything, of one class, is the square of one tanh: two roundings against two
            checks.check_shape(operation(implementation, **options), torch.bfloat16, shape)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=15, derandomize=True, deadline=None, database=None)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(2, 2500)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    scale=st.sampled_from((1.0, 0.25, -2.0)),
    softcap=st.sampled_from((None, 1.5, 30.0)),
    label_smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    z_loss=st.sampled_from((0.0, 1e-4)),
    weighted=st.booleans(),
    reduction=st.sampled_from(("mean", "sum", "none")),
)
def test_drawn(implementation: str, shape: tuple[int, int], dtype: torch.dtype, **options: Any) -> None:
    checks.check_shape(operation(implementation, **options), dtype, shape, draws=1)


PROPERTIES = tuple(check for check in checks.PROPERTIES if check is not checks.check_rounding)  # the loss is float32
NONE_IGNORED: Options = {
    "ignored": 0.0,
    "reduction": "none",
}  # torch lets NaN pass through an ignored token; ours does not


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("options", [NONE_IGNORED, {**EVERYTHING, **NONE_IGNORED}], ids=["none", "everything"])
def test_properties(implementation: str, check: checks.Check, options: Options) -> None:
    check(operation(implementation, **options), torch.bfloat16)


def check_rows(implementation: str, dtype: torch.dtype, tested: ModuleType = package, **options: Any) -> None:
    """Rows that a model hardly gives: huge, equal, infinite, NaN; and what ignored ones hold reaches nothing."""
    nan, inf = float("nan"), float("inf")
    generator = torch.Generator().manual_seed(0)
    z = checks.normal(generator, (13, 2100), dtype)
    z[1] *= 1e4 / z[1].abs().max()
    z[2] = 1e4
    z[3, ::2] = -inf
    z[4] = -inf
    z[5, 1050] = inf
    z[6, 2099] = nan
    z[7], z[8], z[9] = nan, inf, -inf
    z[10] += 1e4
    target = torch.randint(2100, (13,), generator=generator)
    target[3] = 2 * (target[3] // 2)  # a class of probability 0
    target[7:10] = IGNORED
    z, target = z.to(checks.DEVICE), target.to(checks.DEVICE)
    one = operation(implementation, tested, reduction="none", **options)
    counts = target != IGNORED
    checks.judge_results([checks.results(one, (z[counts], target[counts]))])
    grad_output = torch.arange(1.0, 14.0, device=checks.DEVICE)
    ours = checks.differentiate(one.ours, (z, target), [0], grad_output)
    alone = checks.differentiate(one.ours, (z[counts], target[counts]), [0], grad_output[counts])
    for whole, part in zip(ours, alone, strict=True):
        assert not whole[~counts].any(), "an ignored row has a loss or a gradient"
        if not options.get("weighted"):  # weights go by the place in the batch
            assert torch.equal(whole[counts].nan_to_num(3.0), part.nan_to_num(3.0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0}, {"label_smoothing": 0.2}, {"scale": 0.7, "z_loss": 1e-3}], ids=str
)
def test_rows(implementation: str, dtype: torch.dtype, options: Options) -> None:
    check_rows(implementation, dtype, **options)


def check_all_ignored(implementation: str, tested: ModuleType = package) -> None:
    """As in torch, the mean of nothing is NaN and the sum 0; the gradients are zero."""
    z = torch.randn(3, 10, device=checks.DEVICE)
    target = torch.full((3,), IGNORED, device=checks.DEVICE)
    for reduction in ("mean", "sum", "none"):
        for weighted in (False, True):
            one = operation(implementation, tested, reduction=reduction, weighted=weighted, z_loss=0.1)
            ours = checks.differentiate(one.ours, (z, target), [0])
            expected = F.cross_entropy(z, target, ignore_index=IGNORED, reduction=reduction)
            assert torch.equal(ours[0].nan_to_num(3.0), expected.nan_to_num(3.0))
            assert not ours[1].any()


def check_target_out_of_range(tested: ModuleType = package) -> None:
    """Where the host does not look, a target that is no class makes its loss and gradient NaN, and no others."""
    z = torch.randn(5, 100, device=checks.DEVICE)
    target = torch.tensor([3, 100, -1, 2**40, 99], device=checks.DEVICE)
    module = package.implementation_module(tested.KERNEL, checks.DEVICE, torch.float32, 100, "triton")
    form = (1.0, None, IGNORED, 0.0, 0.0)
    loss, stats = module.forward(z, target, *form)
    grad = module.backward(z, target, torch.ones(5, device=checks.DEVICE), stats, *form)
    wrong = torch.tensor([False, True, True, True, False], device=checks.DEVICE)
    assert torch.equal(loss.isnan(), wrong)
    assert torch.equal(grad.isnan().all(1), wrong)
    assert torch.equal(grad.isnan().any(1), wrong)


def check_target_is_named(tested: ModuleType = package) -> None:
    """On a CPU, the host looks."""
    sentence = None
    try:
        tested.cross_entropy(torch.ones(3, 7), torch.tensor([1, 7, 2]), implementation="triton")
    except ValueError as error:
        sentence = str(error)
    expected = (
        "cross_entropy: target 7 is no class; expected 0 to 6, or ignore_index=-100 for a token that does not count."
    )
    assert checks.DEVICE != "cpu" or sentence == expected


def test_a_target_out_of_range_is_named() -> None:
    check_target_is_named()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_ignored(implementation: str) -> None:
    check_all_ignored(implementation)


def test_target_out_of_range_where_the_host_does_not_look() -> None:
    check_target_out_of_range()


def check_memory(tested: ModuleType = package) -> None:
    """The only large memory is the gradient itself: no float32 copy of 16-bit logits, nothing saved but the logits."""
    logits = torch.randn(2048, 4096).bfloat16().requires_grad_()
    with Allocations() as allocations:
        operation("torch", tested, ignored=0.0).ours(logits, torch.arange(2048)).backward()  # type: ignore[no-untyped-call]
    assert [size for size in allocations.sizes if size > logits.nbytes // 4] == [logits.nbytes]


def test_memory() -> None:
    check_memory()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_saved_for_backward(implementation: str) -> None:
    logits, target = operation(implementation).draw((6, 50), torch.bfloat16)
    assert logits is not None
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        operation(implementation).ours(logits.requires_grad_(), target)
    shapes = [(tuple(x.shape), x.dtype) for x in saved]
    assert shapes == [((6, 50), torch.bfloat16), ((6,), torch.int64), ((2, 6), torch.float32)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, EVERYTHING, OPTIONS["num_items"]], ids=["mean", "everything", "num_items"])
def test_compiled(implementation: str, options: Options) -> None:
    torch._dynamo.reset()
    checks.check_compiled(operation(implementation, **options))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_registered(implementation: str, reduction: str) -> None:
    logits, target = operation(implementation).draw((5, 16), torch.float32)
    assert logits is not None
    form = (1.5, 3.0, IGNORED, 0.1, 0.01, reduction, implementation)
    arguments = (logits.requires_grad_(), target, torch.rand(5, device=checks.DEVICE), None, *form)
    library.opcheck(torch.ops.automodel_accel.cross_entropy.default, arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_functorch_is_refused(implementation: str) -> None:
    checks.check_functorch(operation(implementation, ignored=0.0, reduction="none"))


def test_gradients_by_finite_differences() -> None:
    for options in ({}, EVERYTHING, OPTIONS["z-loss"], OPTIONS["weighted"]):
        one = operation("torch", **options)
        logits, target = one.draw((5, 7), torch.float64)
        assert logits is not None
        assert torch.autograd.gradcheck(lambda x: one.ours(x, target), logits.requires_grad_())  # noqa: B023


WRONG: tuple[tuple[Options, str], ...] = (
    ({"logits": torch.ones(7)}, r"logits are \(7,\), expected \[..., V\]"),
    ({"target": torch.ones(4, dtype=torch.int64)}, r"target is \(4,\) torch.int64 .*, expected \(3,\) torch.int64"),
    ({"target": torch.ones(3, dtype=torch.int32)}, r"target is .* torch.int32 .*, expected \(3,\) torch.int64"),
    ({"target": torch.tensor([1, 7, 2])}, "cross_entropy: target 7 is no class; expected 0 to 6, or ignore_index=-100"),
    ({"target": torch.tensor([1, -1, 2])}, "target -1 is no class"),
    ({"token_weight": torch.ones(4)}, r"token_weight is \(4,\) .*, expected \(3,\) of a floating"),
    ({"token_weight": torch.ones(3).requires_grad_()}, "wants a gradient, expected .* without one"),
    ({"token_weight": torch.ones(3, dtype=torch.int64)}, "token_weight is .* torch.int64"),
    ({"z_loss": -1.0}, "z_loss is -1.0, expected a factor of at least 0"),
    ({"reduction": "avg"}, "cross_entropy: reduction 'avg' is unknown"),
    ({"num_items": 0}, "num_items is 0, expected a positive number"),
    ({"implementation": "tritn"}, "Did you mean 'triton'"),
)


@pytest.mark.skipif(checks.DEVICE != "cpu", reason="a GPU does not wait for the host, and the tensors are on the CPU")
@pytest.mark.parametrize(("change", "sentence"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_refused_with_a_sentence(change: Options, sentence: str) -> None:
    arguments: Options = {"logits": torch.ones(3, 7), "target": torch.tensor([0, IGNORED, 6])}
    package.cross_entropy(**arguments)
    with pytest.raises(ValueError, match=sentence):
        package.cross_entropy(**{**arguments, **change})


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    one = operation("triton", weighted=True, num_items=torch.tensor(7, device="cuda"))
    logits, target = one.draw((64, 1000), torch.bfloat16)
    assert logits is not None
    one.ours(logits.requires_grad_(), target).backward()  # type: ignore[no-untyped-call]  # loads and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.ours(logits, target).backward()  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    rows, vocab = 2**14 + 3, 131072
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.randn(vocab, device="cuda")
    last = logits[-1:].clone().requires_grad_()
    target = torch.arange(rows, device="cuda")
    loss = package.cross_entropy(logits.requires_grad_(), target, reduction="none", implementation="triton")
    expected = package.cross_entropy(last, target[-1:], reduction="none", implementation="triton")
    assert torch.equal(loss[-1:], expected)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(grad[-1:], torch.autograd.grad(expected.sum(), last)[0])


def check_package(implementation: str, tested: ModuleType) -> None:
    """What a mutant must not survive: every option, rows of several blocks, and every property once."""
    for options in OPTIONS.values():
        checks.check_shape(operation(implementation, tested, **options), torch.bfloat16, (12, 61), draws=1)
    checks.check_shape(operation(implementation, tested, **EVERYTHING), torch.bfloat16, (2, 2, 2100), draws=1)
    for options in ({}, {"softcap": 5.0}, {"label_smoothing": 0.2}, {"z_loss": 1e-3}):
        check_rows(implementation, torch.float32, tested, **options)
    check_all_ignored(implementation, tested)
    if implementation == "triton":
        check_target_out_of_range(tested)
    else:
        check_target_is_named(tested)
        check_memory(tested)
        checks.check_shape(operation(implementation, tested), torch.float32, (600, 1500), draws=1)  # several blocks
    one = operation(implementation, tested, **{**EVERYTHING, **NONE_IGNORED})
    for check in (checks.check_layouts, checks.check_nothing_overwritten, checks.check_backward_twice):
        check(one, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    implementation = "triton" if mutant.file.endswith("fused.py") else "torch"
    check_caught(mutant, partial(check_package, implementation), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["fused.py", "eager.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"cross_entropy/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as tested:
        check_package("triton" if file == "fused.py" else "torch", tested)
