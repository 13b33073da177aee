"""Room beside the inputs of linears in whole models: the same bits, with and without it."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import automodel_accel as accel
from automodel_accel.kernels import room
from automodel_accel.patches.contract import NOTHING, Counts
from tests.swap.compare import Step, applied, assert_equal, others_off, step
from tests.tiny import batch, tiny

SWAPPED = ("norm", "mlp", "residual", "linear")
TRITON: dict[str, Any] = {**dict.fromkeys(SWAPPED, "triton"), **others_off(*SWAPPED)}
HIDDEN, INTERMEDIATE = 32, 48
ROOMS = {HIDDEN: 48, INTERMEDIATE: 16}


def with_rooms(model: Any, patch: pytest.MonkeyPatch) -> tuple[Step, list[int]]:
    """A step of a model whose producers leave room, and the widths beside which they did."""
    found: list[int] = []
    mark = room.mark

    def watched(output: torch.Tensor) -> None:
        mark(output)
        if room.beside(output):
            assert room.beside(output) >= ROOMS[output.shape[-1]]
            found.append(output.shape[-1])

    counts = accel.report(model).counts
    with patch.context() as inside:
        inside.setattr(room, "mark", watched)
        inside.setattr(counts, "rooms", ROOMS)
        return step(model, **batch()), found


@pytest.mark.parametrize(
    ("architecture", "norms", "recompute"),
    [("llama", 5, None), ("qwen3", 5, "selective"), ("gemma2", 9, None), ("gpt_neox", 0, "selective")],
    ids=lambda value: str(value),
)
def test_the_same_bits(architecture: str, norms: int, recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`norms` of the hidden size (a LayerNorm leaves none); in each of the two layers an MLP."""
    ours = applied(tiny(architecture), recompute=recompute, **TRITON)
    expected = step(ours, **batch())
    got, found = with_rooms(ours, monkeypatch)
    assert_equal(got, expected)
    assert sorted(found) == [HIDDEN] * norms + [INTERMEDIATE] * 2
    assert_equal(step(ours, **batch()), expected)


def test_checkpoints_and_revert(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: Any = applied(tiny(), **TRITON)
    for reentrant in (True, False):
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        expected = step(ours, **batch())
        got, found = with_rooms(ours, monkeypatch)
        assert_equal(got, expected)
        assert INTERMEDIATE in found
    accel.revert(ours)
    assert_equal(step(ours, **batch()), step(tiny(), **batch()))


def test_room_only_where_something_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts(rooms=ROOMS)
    assert [counts.beside(width).columns for width in (HIDDEN, INTERMEDIATE, 8)] == [48, 16, 0]
    assert Counts().beside(HIDDEN) == NOTHING
    with torch.no_grad():
        assert counts.beside(HIDDEN) == NOTHING
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert counts.beside(HIDDEN) == NOTHING
