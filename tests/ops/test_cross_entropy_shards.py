"""cross_entropy of logits that are cut along the vocabulary over ranks, against its definition; ranks are threads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from automodel_accel.kernels import cross_entropy as package
from automodel_accel.kernels.contract import implementation_module
from automodel_accel.kernels.linear_cross_entropy import eager, fused
from automodel_accel.kernels.linear_cross_entropy.shard import VocabShard
from tests.ops import checks
from tests.ops.mutation import Mutant, check_caught, mutated
from tests.ops.ranks import across, on_ranks, one_at_a_time
from tests.ops.test_cross_entropy import EVERYTHING, IMPLEMENTATIONS, OPTIONS, Options, check_rows, operation
from tests.ops.test_implementations import te_stood_in_for

pytestmark = pytest.mark.skipif(checks.DEVICE != "cpu", reason="ranks are threads, which share one GPU's stream")

UNEVEN, EVEN = (0, 0, 20, 20, 61), (0, 31, 62)


@dataclass(frozen=True, slots=True)
class Cut:
    """Stands for the package: its operation, computed by ranks that have the classes between `cuts`."""

    cuts: tuple[int, ...]

    def cross_entropy(self, logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        """Of whole logits [N, V]."""

        def one(_: Any, logits_VN: Any, __: Any, target: Any, ___: Any, ____: Any, shard: VocabShard) -> torch.Tensor:
            return package.cross_entropy(logits_VN.t().contiguous(), target, shard=shard, **options)

        return across(one, self.cuts, None, logits.t(), None, target)


def cut(implementation: str, cuts: tuple[int, ...], **options: Any) -> checks.Operation:
    tested: Any = Cut(cuts)
    return operation(implementation, tested, **options)


@pytest.fixture(autouse=True)
def _one_launch_at_a_time() -> Iterator[None]:
    with one_at_a_time(eager, fused):
        yield


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(options: Options) -> None:
    for dtype, rows in ((torch.float32, 24), (torch.bfloat16, 9)):
        for cuts in (UNEVEN, (0, 16, 32, 48, 61)):
            checks.check_shape(cut("torch", cuts, **options), dtype, (rows, 61), draws=2)


def test_triton() -> None:
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1, "weighted": True}):
        checks.check_shape(cut("triton", UNEVEN, **options), torch.bfloat16, (9, 61), draws=1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hard_rows(implementation: str) -> None:
    tested: Any = Cut((0, 1, 2052, 2100))
    several: tuple[Options, ...] = ({"label_smoothing": 0.2}, {"softcap": 5.0}, {"scale": 0.7, "z_loss": 1e-3})
    for options in several if implementation == "torch" else several[:1]:
        check_rows(implementation, torch.float32, tested, **options)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"weighted": True, "reduction": "sum"}], ids=str)
def test_transformer_engine(options: Options) -> None:
    """By a stand-in with the signatures of its functions."""
    with te_stood_in_for("cross_entropy"):
        for dtype in (torch.float32, torch.bfloat16):
            checks.check_shape(cut("te", EVEN, **options), dtype, (9, EVEN[-1]), draws=2)


def test_who_serves_what() -> None:
    """Transformer Engine takes as many classes of each rank, and no others."""
    features = package.features(1.0, None, 0.0, True, False)
    assert features == {package.SHARDED, package.UNEVEN}
    te = next(one for one in package.KERNEL.implementations if one.name == "te")
    assert features - te.features == {package.UNEVEN}


WRONG: tuple[tuple[tuple[int, int, int], str], ...] = (
    ((0, 6, 9), r"rows 0 to 6 of a vocabulary of 9, but logits is \(3, 7\); expected the rows that this rank holds"),
    ((1, 8, 7), "rows 1 to 8 of a vocabulary of 7, expected 0 <= start <= stop <= vocab"),
    ((0, 7, 8), "target 8 is no class; expected 0 to 7"),
)


@pytest.mark.parametrize(("rows", "sentence"), WRONG, ids=[str(rows) for rows, _ in WRONG])
def test_what_does_not_fit_is_refused_with_a_sentence(rows: tuple[int, int, int], sentence: str) -> None:
    def one(rank: int, group: Any) -> None:
        package.cross_entropy(torch.ones(3, 7), torch.tensor([0, 6, 8]), shard=VocabShard(group, *rows))

    with pytest.raises(ValueError, match=sentence):
        on_ranks(1, one)


SHARDS = "cross_entropy/shards.py"
MUTANTS = (
    Mutant(SHARDS, "            loss_N += ", "            _ = ", "the z-loss forgotten"),
    Mutant(SHARDS, "torch.where(target_N == ignore_index, 0.0, z_loss_N)", "z_loss_N", "ignored rows have a z-loss"),
    Mutant(SHARDS, "(1.0 + 2.0 * z_loss *", "(1.0 + z_loss *", "half of the z-loss's slope"),
    Mutant(SHARDS, "torch.where(self.rows.is_class(target_N), weight_N, torch.nan)", "weight_N * 1", "no class at all"),
    Mutant(
        SHARDS,
        "grad_NV = logits_NV.clone(memory_format=torch.contiguous_format)",
        "grad_NV = logits_NV",
        "the caller's",
    ),
    Mutant(SHARDS, "self.rows.start, self.rows.vocab", "0, self.rows.vocab", "the gradient at the first classes"),
)


def check_shards(tested: ModuleType) -> None:
    """What a mutant must not survive; on the implementation loaded again, so that it imports the mutant."""
    for options in (EVERYTHING, OPTIONS["z-loss"]):
        checks.check_shape(cut("torch", UNEVEN, **options), torch.float32, (9, 61), draws=1)
    z, target = torch.randn(4, 9), torch.tensor([0, 9, -1, 8])
    module = implementation_module(tested.KERNEL, "cpu", torch.float32, 9, "torch", tested.FEATURES)

    def of_rank(rank: int, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        form = (1.0, None, -100, 0.0, 0.0)
        rows, own = module.sharded(group, 5 * rank, 9), z[:, 5 * rank : 5 + 4 * rank]
        loss, stats = rows.forward(own, target, *form)
        return loss, rows.backward(own, target, torch.ones(4), stats, *form)

    before = z.clone()
    for loss, grad in on_ranks(2, of_rank):
        assert loss.isnan().tolist() == grad.isnan().all(1).tolist() == [False, True, True, False]
    assert torch.equal(z, before), "the caller's logits were written to"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.why)
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    def check(_: ModuleType) -> None:
        again = Mutant("cross_entropy/eager.py", "import torch\n", "import torch\n", "none")
        with mutated(again, tmp_path) as tested:
            check_shards(tested)

    check_caught(mutant, check, tmp_path)


def test_an_unchanged_copy_passes_what_catches_mutants() -> None:
    check_shards(package)
