"""linear_cross_entropy of a vocabulary that is cut over ranks, against its definition; ranks are threads of one process."""

import itertools
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import library

from automodel_accel.kernels import linear_cross_entropy as package
from automodel_accel.kernels.linear_cross_entropy import reference, shard
from automodel_accel.kernels.linear_cross_entropy.shard import Sharded, VocabShard
from tests.ops import checks
from tests.ops.allocations import Allocations
from tests.ops.checks_linear_cross_entropy import (
    EVERYTHING,
    FORMS,
    IGNORED,
    IMPLEMENTATIONS,
    LOW_RANK,
    OPTIONS,
    ROW_DTYPES,
    TWO_ROWS,
    VOCAB,
    Options,
    check_rows,
    check_target_out_of_range,
    check_values,
    module_of,
    operation,
)
from tests.ops.mutants_linear_cross_entropy_shards import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated
from tests.ops.ranks import RowsAcross, on_ranks, one_at_a_time

pytestmark = pytest.mark.skipif(checks.DEVICE != "cpu", reason="ranks are threads, which share one GPU's stream")

TWO, FOUR, SOME_EMPTY = (0, 31, VOCAB), (0, 16, 32, 48, VOCAB), (0, 0, 20, 20, VOCAB, VOCAB)
FEW = ("everything and z-loss", "z-loss", "a class ignored", "a bound")  # for Triton's interpreter, which is slow
SEVERAL_BLOCKS = {"triton": (0, 1, 2052, 2100), "torch": (0, 1, 50_000, 50_003)}  # on one of the ranks


@pytest.fixture(autouse=True)
def _one_launch_at_a_time() -> Iterator[None]:
    modules = [module_of(name) for name in IMPLEMENTATIONS]
    with one_at_a_time(*modules):
        yield


@pytest.mark.parametrize("cuts", [TWO, SOME_EMPTY], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(options: Options, cuts: tuple[int, ...]) -> None:
    for dtype in checks.DTYPES:
        check_values(operation("torch", cuts=cuts, **options), dtype)


@pytest.mark.parametrize("options", LOW_RANK.values(), ids=LOW_RANK.keys())
def test_low_rank(options: Options) -> None:
    """In 16 bit it is luck where the sum of two products is rounded, which many draws even out; over ranks nothing changes in that."""
    for cuts in (TWO, SOME_EMPTY):
        check_values(operation("torch", cuts=cuts, **options), torch.float32)
    checks.check_shape(operation("torch", cuts=FOUR, **options), torch.bfloat16, (9, 16), draws=32)


@pytest.mark.parametrize("name", FEW)
def test_triton(name: str) -> None:
    for dtype, cuts in ((torch.bfloat16, TWO), (torch.float16, SOME_EMPTY)):
        checks.check_shape(operation("triton", cuts=cuts, **OPTIONS[name]), dtype, (9, 16), draws=2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_uneven_vocabulary(ranks: int) -> None:
    """101 classes, as torch.chunk cuts them."""
    cuts = (0, *itertools.accumulate(chunk.numel() for chunk in torch.arange(101).chunk(ranks)))
    for options in ({}, EVERYTHING):
        check_values(operation("torch", 101, cuts=cuts, **options), torch.float32)
        check_values(operation("torch", 101, cuts=cuts, **options), torch.bfloat16)


def check_hard_rows(implementation: str, cuts: tuple[int, ...], tested: Any = Sharded) -> None:
    """Logits that a head hardly gives, in every form; targets that are no class."""
    for dtype, form in zip(ROW_DTYPES, FORMS, strict=True):
        rows: Any = RowsAcross(tested, module_of(implementation, dtype), cuts)
        check_rows(rows, dtype, cuts[-1], *form)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hard_rows(implementation: str) -> None:
    check_hard_rows(implementation, SEVERAL_BLOCKS[implementation])
    if implementation == "torch":
        check_hard_rows(implementation, (0, 1, 1, 60, 100))
    check_target_out_of_range(RowsAcross(Sharded, module_of(implementation), (0, 40, 100)))  # type: ignore[arg-type]


def test_properties() -> None:
    for options in ({}, {"reduction": "none"}, OPTIONS["two rows a chunk"]):
        for check in (checks.check_nothing_overwritten, checks.check_backward_twice, checks.check_repeatable):
            check(operation("torch", cuts=FOUR, **options), torch.bfloat16)


def test_no_target_counts() -> None:
    hidden, weight, bias, target = operation("torch").draw((5, 16), torch.float32)
    assert target is not None
    inputs = (hidden, weight, bias, torch.full_like(target, IGNORED))
    for reduction in package.REDUCTIONS:
        one = operation("torch", cuts=SOME_EMPTY, reduction=reduction)
        loss, *grads = checks.differentiate(one.ours, inputs, [0, 1, 2])
        assert loss.isnan().all() if reduction == "mean" else not loss.any()
        assert not any(grad.any() for grad in grads)


def test_one_small_collective_for_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 numbers a token; the chunks are those of the most classes that a rank holds, on all ranks alike."""
    gathered: list[tuple[int, ...]] = []
    real = dist.all_gather

    def all_gather(parts: Any, own: torch.Tensor, group: Any) -> None:
        gathered.append(tuple(own.shape))
        real(parts, own, group=group)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    one = operation("torch", cuts=(0, 1, 60, VOCAB), workspace_bytes=4 * 21 * 3, ignored=0.0)
    checks.differentiate(one.ours, one.draw((10, 16), torch.float32), [0, 1, 2])
    assert sorted(gathered) == [(5, 1)] * 3 + [(5, 3)] * 9


def test_memory_is_this_ranks_share() -> None:
    """Beyond a chunk of its own logits, a rank's only large memory is the gradient of its rows."""
    rows, hidden_size, vocab, chunk_rows = 64, 48, 512, 4
    own, chunk = 128, 4 * chunk_rows * 128
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (checks.normal(generator, (n, hidden_size), torch.float32) for n in (rows, vocab))
    target = torch.randint(vocab, (rows,), generator=generator)

    def one(rank: int, group: Any) -> list[int]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight[rank * own : (rank + 1) * own])]
        where = VocabShard(group, rank * own, (rank + 1) * own, vocab)
        with Allocations() as allocations:
            loss = package.linear_cross_entropy(
                *leaves, target, shard=where, workspace_bytes=chunk, implementation="torch"
            )
            loss.backward()  # type: ignore[no-untyped-call]
        return sorted((size for size in allocations.sizes if size > chunk), reverse=True)

    for large in on_ranks(4, one):
        assert large == [4 * own * hidden_size, 4 * rows * hidden_size]


def test_the_reference_is_the_whole_vocabularys() -> None:
    one = operation("torch")
    hidden, weight, bias, target = one.draw((9, 16), torch.float64)
    whole = reference.linear_cross_entropy(hidden, weight, target, bias)  # type: ignore[arg-type]

    def of_rank(rank: int, group: Any) -> torch.Tensor:
        start, stop = FOUR[rank], FOUR[rank + 1]
        rows = VocabShard(group, start, stop, VOCAB)
        return reference.linear_cross_entropy(hidden, weight[start:stop], target, bias[start:stop], shard=rows)  # type: ignore[arg-type, index]

    for loss in on_ranks(4, of_rank):
        torch.testing.assert_close(loss, whole, rtol=1e-14, atol=0)


def test_registered() -> None:
    hidden, weight, bias, target = operation("torch").draw((5, 16), torch.float32)

    def one(rank: int, group: Any) -> None:
        floats = [x[: 61 if i else 5].requires_grad_() for i, x in enumerate((hidden, weight, bias)) if x is not None]
        options = (
            1.5,
            3.0,
            IGNORED,
            0.1,
            0.05,
            "mean",
            None,
            None,
            "torch",
            [True] * 3 + [False] * 2,
            group.group_name,
            0,
            VOCAB,
        )
        library.opcheck(
            torch.ops.automodel_accel.linear_cross_entropy.default, (*floats, None, None, target, None, *options)
        )

    on_ranks(1, one)


WRONG: tuple[tuple[tuple[int, int, int], str], ...] = (
    ((0, 6, 7), r"rows 0 to 6 of a vocabulary of 7, but weight is \(7, 8\); expected the rows that this rank holds"),
    ((3, 10, 9), "rows 3 to 10 of a vocabulary of 9, expected 0 <= start <= stop <= vocab"),
    ((-1, 6, 7), "rows -1 to 6 of a vocabulary of 7, expected 0 <= start"),
)


@pytest.mark.parametrize(("rows", "sentence"), WRONG, ids=[str(rows) for rows, _ in WRONG])
def test_a_wrong_shard_is_refused_with_a_sentence(rows: tuple[int, int, int], sentence: str) -> None:
    def one(rank: int, group: Any) -> None:
        given = torch.ones(3, 8), torch.ones(7, 8), torch.tensor([0, IGNORED, 6])
        package.linear_cross_entropy(*given, shard=VocabShard(group, *rows))

    with pytest.raises(ValueError, match=sentence):
        on_ranks(1, one)


def test_a_target_and_a_group_are_refused_with_a_sentence() -> None:
    hidden, weight = torch.ones(3, 8), torch.ones(7, 8)
    with pytest.raises(ValueError, match="its group is None; expected the process group of the ranks"):
        package.linear_cross_entropy(hidden, weight, torch.zeros(3).long(), shard=VocabShard(None, 0, 7, 9))

    def one(rank: int, group: Any) -> None:
        package.linear_cross_entropy(hidden, weight, torch.tensor([0, 8, 9]), shard=VocabShard(group, 0, 7, 9))

    with pytest.raises(ValueError, match="target 9 is no class; expected 0 to 8"):
        on_ranks(1, one)


def check_shards(implementation: str, tested: ModuleType, sharded: Any) -> None:
    """What a mutant must not survive."""
    check_hard_rows(
        implementation, SEVERAL_BLOCKS["triton"] if implementation == "triton" else (0, 1, 1, 60, 100), sharded
    )
    check_target_out_of_range(RowsAcross(sharded, module_of(implementation), (0, 40, 100)))  # type: ignore[arg-type]
    for options in ({}, {"label_smoothing": 0.2, "reduction": "none"}, {"softcap": 2.0, "scale": 0.7}, {"z_loss": 0.1}):
        one = operation(implementation, cuts=SOME_EMPTY, tested=tested, workspace_bytes=TWO_ROWS, **options)
        checks.check_shape(one, torch.bfloat16, (9, 16), draws=1)


def check_file(file: str, folder: Path, tested: ModuleType) -> None:
    """What catches mutants; for shard.py on host code that is loaded again, and so imports it anew."""
    if not file.endswith("shard.py"):
        implementation = "triton" if file.endswith("fused.py") else "torch"
        with one_at_a_time(module_of(implementation)):
            check_shards(implementation, tested, Sharded)
        return
    chunks, host = (
        Mutant(f"linear_cross_entropy/{name}", "import torch\n", "import torch\n", "none")
        for name in ("chunks.py", "__init__.py")
    )
    with mutated(chunks, folder), mutated(host, folder) as anew:
        check_shards("torch", anew, sys.modules[shard.__name__].Sharded)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    check_caught(mutant, partial(check_file, mutant.file, tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["fused.py", "eager.py", "shard.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"linear_cross_entropy/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as tested:
        check_file(file, tmp_path, tested)
