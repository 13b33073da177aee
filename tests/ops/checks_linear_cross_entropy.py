"""What linear_cross_entropy is held to, beyond `tests.ops.checks`; each check takes the package to test, for mutants."""

import itertools
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from automodel_accel.kernels import linear_cross_entropy as package
from automodel_accel.kernels.contract import implementation_module
from tests.ops import checks
from tests.ops.allocations import Allocations
from tests.ops.ranks import across

IMPLEMENTATIONS = package.KERNEL.names()
VOCAB = 61
IGNORED = -100
CLASS = 3  # ignored in one of the cases
SEVERAL_BLOCKS = {"triton": 2051, "torch": 100_003}  # a vocabulary that an implementation works off in parts
Options = Mapping[str, Any]


def operation(
    implementation: str,
    vocab: int = VOCAB,
    bias: bool = True,
    rank: int = 0,
    wide: bool = False,
    ignored: float = 0.25,
    tested: ModuleType = package,
    workspace_bytes: int | None = None,
    valid_rows: int | None = None,
    cuts: Sequence[int] = (),
    **options: Any,
) -> checks.Operation:
    """linear_cross_entropy of (hidden [..., H], weight, bias, target), with all else fixed; of (..., lora_x, lora_b) with a rank.

    With `wide`, these two are float32 whatever the others are. With `cuts`, ranks hold the vocabulary between them.
    """
    ignore_index = options.get("ignore_index", IGNORED)

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        hidden = checks.normal(generator, shape, dtype)
        weight = checks.normal(generator, (vocab, shape[-1]), dtype) * shape[-1] ** -0.5
        target = torch.randint(vocab, (math.prod(shape[:-1]),), generator=generator)
        dropped = torch.rand(target.shape, generator=generator) < ignored
        dropped[:1] = False  # a mean over no target has a test of its own
        target = target.masked_fill(dropped, ignore_index)
        head = hidden, weight, checks.normal(generator, (vocab,), dtype) if bias else None, target
        if not rank:
            return head
        kind = torch.promote_types(dtype, torch.float32) if wide else dtype
        lora_x = checks.normal(generator, (target.shape[0], rank), kind)
        return *head, lora_x, checks.normal(generator, (vocab, rank), kind) * rank**-0.5

    def ours(*whole: Any) -> torch.Tensor:
        return across(one_rank, cuts, *whole) if cuts else one_rank(*whole)

    def one_rank(
        hidden: Any, weight: Any, b: Any, target: Any, lora_x: Any = None, lora_b: Any = None, shard: Any = None
    ) -> torch.Tensor:
        own = {"workspace_bytes": workspace_bytes, "valid_rows": valid_rows, "implementation": implementation}
        own |= {"lora_x": lora_x, "lora_b": lora_b, "shard": shard}
        loss = tested.linear_cross_entropy(hidden.flatten(0, -2), weight, target, bias=b, **own, **options)
        assert isinstance(loss, torch.Tensor)
        return loss

    def theirs(hidden: Any, weight: Any, b: Any, target: Any, *low_rank: Any) -> torch.Tensor:
        more = dict(zip(("lora_x", "lora_b"), low_rank))
        return package.reference.linear_cross_entropy(hidden.flatten(0, -2), weight, target, b, **more, **options)

    return checks.Operation(ours=ours, theirs=theirs, inputs=inputs)


def check_values(one: checks.Operation, dtype: torch.dtype) -> None:
    """The output and every gradient pass `judge`; in float32 over several orders of torch's sums."""
    if dtype == torch.float32:
        check_in_orders(one, (16, 32))
    else:
        checks.check_shape(one, dtype, (9, 16), draws=2)


def check_in_orders(one: checks.Operation, shape: tuple[int, int], draws: int = 2, orders: int = 8) -> None:
    """In float32, judge ours by what torch makes of the same problem with tokens and vocabulary in several orders.

    There, torch and ours are wrong by nothing but the roundings of their sums. In one order, it is chance which is off by more.
    """
    judged = []
    for seed in range(draws):
        inputs = one.draw(shape, torch.float32, seed)
        hidden, weight, bias, target, *low_rank = inputs
        assert hidden is not None
        assert weight is not None
        assert target is not None
        results = checks.results(one, inputs)
        grad_output = checks.grad_output_for(results[0].ours)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(orders):
            tokens, classes = (torch.randperm(x.shape[0], generator=generator).to(x.device) for x in (hidden, weight))
            if classes.numel() > CLASS:  # keeps its number
                classes[classes == CLASS], classes[CLASS] = classes[CLASS].item(), CLASS
            renamed = torch.where(target < 0, target, classes.argsort()[target.clamp(min=0)])
            places = (tokens, classes, classes, tokens, tokens, classes)
            given = (hidden, weight, bias, renamed, *low_rank)
            problem = tuple(None if x is None else x[place] for x, place in zip(given, places))
            vector = grad_output.dim() > 0
            upstream = grad_output[tokens] if vector else grad_output
            theirs = checks.differentiate(one.theirs, problem, checks.floating(inputs), upstream)
            where = [tokens if vector else None, *(places[i] for i in checks.floating(inputs))]
            judged.append([x._replace(theirs=_put_back(y, place)) for x, y, place in zip(results, theirs, where)])
    checks.judge_results(judged)


def _put_back(x: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    return x if places is None else torch.empty_like(x).index_copy_(0, places, x)


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
    "z-loss": {"z_loss": 0.1, "scale": 1.5},
    "z-loss, num_items": {"z_loss": 0.1, "num_items": 5},
    "everything": EVERYTHING,
    "everything and z-loss": {**EVERYTHING, "z_loss": 0.05},
    "a class ignored": {"ignore_index": CLASS},
    "num_items": {"num_items": 5},
    "num_items on the device": {"num_items": torch.tensor(7, device=checks.DEVICE)},
    "a row a chunk": {"workspace_bytes": 1},
    "two rows a chunk": {"workspace_bytes": TWO_ROWS, **EVERYTHING},
    "a bound": {"valid_rows": 8, "ignored": 0.75},
    "a bound, two rows a chunk": {"valid_rows": 8, "ignored": 0.75, "workspace_bytes": TWO_ROWS, "reduction": "sum"},
}


# the head of a LoRA adapter: each property of the loop over chunks, and parts of a chunk in a wider dtype
LOW_RANK: Mapping[str, Options] = {
    "mean": {"rank": 3},
    "none, no bias": {"rank": 5, "bias": False, "reduction": "none"},
    "everything": {"rank": 3, **EVERYTHING},
    "two rows a chunk": {"rank": 4, "workspace_bytes": TWO_ROWS, "softcap": 2.0},
    "wide": {"rank": 4, "wide": True},
    "wide, four rows a chunk": {"rank": 3, "wide": True, "workspace_bytes": 2 * TWO_ROWS, "label_smoothing": 0.1},
    "wide, everything": {"rank": 3, "wide": True, "workspace_bytes": TWO_ROWS, **EVERYTHING},
}


EXACT: tuple[checks.Check, ...] = (
    checks.check_nothing_overwritten,
    checks.check_backward_twice,
    checks.check_repeatable,
    checks.check_double_backward,
)
# softcap, smoothing, z-loss
FORMS = ((None, 0.0, 0.0), (None, 0.2, 0.0), (5.0, 0.0, 0.0), (5.0, 0.2, 0.0), (None, 0.0, 0.01), (5.0, 0.2, 0.1))
ROW_DTYPES = (torch.bfloat16, torch.float32) * 3  # one a form, where a check takes each of both once


def check_rows(
    module: ModuleType, dtype: torch.dtype, vocab: int, softcap: float | None, smoothing: float, z_loss: float
) -> None:
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
    form = (0.7, softcap, IGNORED, smoothing, z_loss)

    def theirs(x: torch.Tensor) -> list[torch.Tensor]:
        x = x.masked_fill((target == IGNORED)[:, None], 0.0).requires_grad_()
        logits = x.to(torch.promote_types(x.dtype, torch.float32)) * form[0]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        loss = F.cross_entropy(logits, target, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none")
        if z_loss:
            loss = loss + z_loss * logits.logsumexp(-1).square().masked_fill(target == IGNORED, 0.0)
        return [loss.detach(), *torch.autograd.grad(loss, x, weight.to(loss.dtype))]

    padded = z.new_full((2, 12, -(-vocab // 16) * 16), nan)[..., :vocab].copy_(z)
    loss = module.backward(padded[0], target, weight, *form)
    assert torch.equal(module.forward(padded[1], target, *form).nan_to_num(3.0), loss.nan_to_num(3.0))
    assert not padded[0, 7:10].any(), "the gradient of an ignored row is not zero"
    ours = [loss, padded[0]]
    results = zip(("loss", "gradient"), ours, theirs(z), theirs(z.double()), strict=True)
    checks.judge_results([[checks.Result(*result) for result in results]])


def module_of(implementation: str, dtype: torch.dtype = torch.float32, tested: ModuleType = package) -> ModuleType:
    module: ModuleType = implementation_module(tested.KERNEL, checks.DEVICE, dtype, VOCAB, implementation)
    return module


def check_target_out_of_range(module: ModuleType) -> None:
    """On a GPU, where no error can be raised in time, a target that is no class makes loss and gradient NaN."""
    z = torch.randn(5, 100, device=checks.DEVICE)
    target = torch.tensor([3, 100, -1, 2**40, 99], device=checks.DEVICE)
    loss = module.backward(z, target, torch.ones(5, device=checks.DEVICE), 1.0, None, IGNORED, 0.0, 0.1)
    wrong = torch.tensor([False, True, True, True, False], device=checks.DEVICE)
    assert torch.equal(loss.isnan(), wrong)
    assert torch.equal(z.isnan().all(1), wrong)
    assert torch.equal(z.isnan().any(1), wrong)


def check_scale(module: ModuleType) -> None:
    """In place, rounded once, by one for all dtypes; longer than a block, and no multiple of it."""
    for dtype, factor in itertools.product(checks.DTYPES, (1.0, 0.3, -2.0, float("nan"))):
        x = checks.normal(torch.Generator().manual_seed(0), (3, 5000), dtype).to(checks.DEVICE)
        expected = (x.float() * factor).to(dtype)
        module.scale_(x, torch.tensor(factor, device=checks.DEVICE))
        assert torch.equal(x.nan_to_num(), expected.nan_to_num())
        assert torch.equal(x.isnan(), expected.isnan())


def _loss_and_gradients(implementation: str, tested: ModuleType = package, **options: Any) -> list[torch.Tensor]:
    one = operation(implementation, tested=tested, **options)
    return checks.differentiate(one.ours, one.draw((9, 16), torch.float32), [0, 1, 2])


def check_all_ignored(implementation: str, tested: ModuleType = package) -> None:
    """As in torch, the mean of nothing is NaN and the sum 0, and the gradients are zero; dropped or not."""
    hidden, weight, bias, target = operation(implementation).draw((5, 16), torch.float32)
    assert target is not None
    for reduction, smoothing, valid_rows in itertools.product(package.REDUCTIONS, (0.0, 0.1), (None, 0, 5)):
        options: Options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": smoothing}
        one = operation(implementation, tested=tested, valid_rows=valid_rows, **options)
        inputs = (hidden, weight, bias, torch.full_like(target, IGNORED))
        ours, theirs = (checks.differentiate(function, inputs, [0, 1, 2]) for function in (one.ours, one.theirs))
        for mine, expected in zip(ours, theirs, strict=True):
            assert torch.equal(mine.nan_to_num(3.0), expected.nan_to_num(3.0)), options


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
    counting = int((inputs[3] != IGNORED).sum())  # type: ignore[union-attr]
    if checks.DEVICE == "cpu":  # a GPU drops rows only where it knows how many
        assert all(map(torch.equal, whole, _loss_and_gradients(implementation, tested, valid_rows=counting)))
    leaves = [x.detach().requires_grad_() for x in inputs[:3] if x is not None]
    loss = one.ours(*leaves, inputs[3])
    grad_output = torch.full_like(loss, 0.25)
    parts = [torch.autograd.grad(loss, leaf, grad_output, retain_graph=True)[0] for leaf in leaves]
    assert all(map(torch.equal, parts, quarter[1:])), "asked for one gradient at a time"


def check_memory(implementation: str, tested: ModuleType = package) -> None:
    """Beyond a chunk of logits, the only large memory is one gradient of the weight, which becomes `.grad` itself."""
    rows, hidden_size, vocab, chunk_rows = 64, 48, 512, 4
    chunk, grad_hidden, grad_weight = (4 * n for n in (chunk_rows * vocab, rows * hidden_size, vocab * hidden_size))
    for frozen, reduction, grad_output in itertools.product((False, True), package.REDUCTIONS, (1.0, 0.5)):
        one = operation(implementation, vocab, tested=tested, workspace_bytes=chunk, reduction=reduction, ignored=0.0)
        hidden, weight, bias, target = one.draw((rows, hidden_size), torch.float32)
        assert hidden is not None
        assert weight is not None
        hidden.requires_grad_()
        weight.requires_grad_(not frozen)
        with Allocations() as allocations:
            loss = one.ours(hidden, weight, bias, target)
            loss.backward(torch.full_like(loss, grad_output))  # type: ignore[no-untyped-call]
        large = sorted((size for size in allocations.sizes if size >= chunk), reverse=True)
        chunks = 2 if reduction == "none" else 1  # for "none", backward has one of its own
        assert large == [grad_weight] * (not frozen) + [grad_hidden] + [chunk] * chunks, (frozen, reduction)


def check_autocast(implementation: str, tested: ModuleType = package) -> None:
    """Autocast, inside whose region a model computes its loss, changes nothing: the tensors' dtype is what counts."""
    with torch.autocast(checks.DEVICE, torch.bfloat16):
        inside = _loss_and_gradients(implementation, tested)
    assert all(map(torch.equal, inside, _loss_and_gradients(implementation, tested)))


def check_low_rank_values(implementation: str, tested: ModuleType = package) -> None:
    """In bfloat16. The sum of two products is rounded at other places than in torch: luck takes many draws to even out."""
    for options in LOW_RANK.values():
        checks.check_shape(operation(implementation, tested=tested, **options), torch.bfloat16, (9, 16), draws=64)


def check_low_rank_details(implementation: str, tested: ModuleType = package) -> None:
    """Frozen inputs change no bit; nothing of an ignored row arrives; no row gives zeros; a rank of zero adds nothing."""
    for wide in (False, True):
        one = operation(implementation, rank=3, wide=wide, workspace_bytes=TWO_ROWS, tested=tested)
        hidden, weight, bias, target, lora_x, lora_b = inputs = one.draw((9, 16), torch.bfloat16)
        assert target is not None
        assert lora_x is not None
        assert lora_b is not None
        positions = checks.floating(inputs)
        whole = dict(zip(positions, checks.differentiate(one.ours, inputs, positions)[1:], strict=True))
        for wanted in ((0, 4, 5), (4,), (5,), (0,), (1, 2)):
            _, *some = checks.differentiate(one.ours, inputs, wanted)
            assert all(torch.equal(grad, whole[i]) for grad, i in zip(some, wanted, strict=True)), wanted
        ignored = (target == IGNORED)[:, None]
        if checks.DEVICE == "cpu":  # a GPU drops rows only where it knows how many
            counting = int((~ignored).sum())
            bound = operation(
                implementation, rank=3, wide=wide, valid_rows=counting, workspace_bytes=TWO_ROWS, tested=tested
            )
            assert all(map(torch.equal, checks.differentiate(bound.ours, inputs, positions)[1:], whole.values()))
        poisoned = lora_x.masked_fill(ignored, float("nan") if checks.DEVICE == "cpu" else 1e4)
        _, *grads = checks.differentiate(one.ours, (hidden, weight, bias, target, poisoned, lora_b), positions)
        assert all(map(torch.equal, grads, whole.values()))
        assert not whole[4][ignored[:, 0]].any()
        _, *grads = checks.differentiate(one.ours, (*inputs[:3], target.fill_(IGNORED), *inputs[4:]), positions)
        assert not any(grad.any() for grad in grads)


def check_low_rank_memory(implementation: str, tested: ModuleType = package) -> None:
    """A frozen head has no gradient's memory, whatever its adapter needs; an adapter in float32 widens parts of a chunk."""
    rows, hidden_size, vocab, chunk_rows = 64, 48, 512, 8
    for frozen, reduction, dtype in itertools.product((True, False), ("mean", "none"), (torch.float32, torch.bfloat16)):
        chunk, grad_weight = dtype.itemsize * chunk_rows * vocab, dtype.itemsize * vocab * hidden_size
        options: Options = {"reduction": reduction, "ignored": 0.0, "workspace_bytes": chunk, "bias": False}
        one = operation(implementation, vocab, rank=2, wide=True, tested=tested, **options)
        hidden, weight, _, target, lora_x, lora_b = one.draw((rows, hidden_size), dtype)
        for x in (hidden, lora_x, lora_b, None if frozen else weight):
            if x is not None:
                x.requires_grad_()
        with Allocations() as allocations:
            loss = one.ours(hidden, weight, None, target, lora_x, lora_b)
            loss.backward(torch.ones_like(loss))  # type: ignore[no-untyped-call]
        large = sorted((size for size in allocations.sizes if size >= chunk), reverse=True)
        chunks = 2 if reduction == "none" else 1  # for "none", backward has one of its own
        if dtype == torch.float32:
            assert large == [grad_weight] * (not frozen) + [chunk] * chunks, (frozen, reduction, large)
        else:  # the implementation itself widens what it works on
            assert [size for size in large if size > 2 * chunk] == [grad_weight] * (not frozen), (frozen, reduction)
            parts = chunks * (rows // chunk_rows) * (chunk_rows // 2)
            assert sum(size == chunk // 2 for size in allocations.sizes) >= parts


def check_package(implementation: str, tested: ModuleType) -> None:
    """What a mutant must not survive: every branch and every property, once."""
    for dtype, form in zip(ROW_DTYPES, FORMS, strict=True):
        check_rows(module_of(implementation, dtype, tested), dtype, SEVERAL_BLOCKS[implementation], *form)
    check_scale(module_of(implementation, tested=tested))
    if implementation == "triton":
        check_target_out_of_range(module_of(implementation, tested=tested))
    for options in OPTIONS.values():
        checks.check_shape(operation(implementation, tested=tested, **options), torch.bfloat16, (9, 16), draws=1)
    checks.check_shape(operation(implementation, tested=tested), torch.float16, (9, 16), draws=1)
    for check in (check_ignored_rows, check_all_ignored, check_bits, check_autocast):
        check(implementation, tested)
    check_memory("torch", tested)
    for exact in EXACT:
        exact(operation(implementation, tested=tested), torch.float32)
    if implementation == "torch":
        for check in (check_low_rank_values, check_low_rank_details, check_low_rank_memory):
            check(implementation, tested)
