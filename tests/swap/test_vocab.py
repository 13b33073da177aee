"""A training step with a head that is cut along the vocabulary: over threads, and over two processes, with DTensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from automodel_accel.patches import loss as patch
from automodel_accel.patches import vocab
from tests.launching import of_each
from tests.ops.ranks import on_ranks
from tests.swap.vocab_heads import CASES, Case, build, check, cut_head, plain


def over_threads(case: Case, ranks: int) -> None:
    models = [build(case) for _ in range(ranks)]
    on_ranks(ranks, lambda rank, group: check(case, *models[rank], group))


@pytest.mark.parametrize("name", CASES)
def test_three_ranks(name: str) -> None:
    over_threads(CASES[name], 3)


Broken = Callable[[pytest.MonkeyPatch], None]
BROKEN: dict[str, Broken] = {
    "the loss's gradient not summed": lambda broken: broken.setattr(patch, "copy_to", lambda x, group: x),
    "the logits' gradient not summed": lambda broken: broken.setattr(vocab, "copy_to", lambda x, group: x),
    "the classes counted from one on": lambda broken: broken.setattr(patch, "prefix", _shifted),
    "the first rows of the model's": lambda broken: broken.setattr(patch, "own_rows", _first_rows),
}


def _shifted(shard: vocab.VocabShard, length: int) -> vocab.VocabShard:
    kept = vocab.prefix(shard, length)
    return vocab.VocabShard(kept.group, kept.start + 1, kept.stop + 1, kept.vocab + 1)


def _first_rows(parameter: torch.Tensor, linear: Any, shard: vocab.VocabShard) -> torch.Tensor:
    return parameter[: shard.stop - shard.start]


@pytest.mark.parametrize("how", BROKEN)
def test_a_mistake_is_caught(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["a row of the model's" if "model's" in how else "LoRA"]
    models = [build(case) for _ in range(2)]
    BROKEN[how](monkeypatch)
    with pytest.raises(AssertionError):
        on_ranks(2, lambda rank, group: check(case, *models[rank], group))


def test_a_rank_without_rows() -> None:
    """Five classes over four ranks: 2, 2, 1 and none."""
    case = Case(lambda: plain(vocab_size=5))
    models = [build(case) for _ in range(4)]

    def one(rank: int, group: Any) -> None:
        ours, vanilla = models[rank]
        shards = cut_head(ours, group)
        inputs = {"input_ids": torch.arange(12).view(2, 6) % 5, "labels": torch.arange(12).view(2, 6) % 5}
        steps = [model(**inputs) for model in (ours, vanilla)]
        for outputs in steps:
            outputs.loss.backward()
        torch.testing.assert_close(steps[0].loss, steps[1].loss, rtol=1e-6, atol=1e-6)
        for (path, mine), theirs in zip(ours.named_parameters(), vanilla.parameters(), strict=True):
            expected = theirs.grad[shards[path].start : shards[path].stop] if path in shards else theirs.grad
            torch.testing.assert_close(mine.grad, expected, rtol=1e-5, atol=1e-6)
        assert steps[0].logits.shape == (2, 6, 5)
        torch.testing.assert_close(steps[0].logits + 0, steps[1].logits, rtol=1e-5, atol=1e-6)

    on_ranks(4, one)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found, of one launch."""
    return of_each("tests.swap.vocab_distributed", tmp_path_factory.mktemp("vocab"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes(found: list[dict[str, str]], name: str) -> None:
    assert [rank[name] for rank in found] == ["", ""]
