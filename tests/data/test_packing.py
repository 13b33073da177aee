"""Packing: the rule loses nothing, and a model sees and learns the same as from one document a row."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_accel.data import IGNORED, Sample
from automodel_accel.data.batches import packed, padded
from automodel_accel.data.packing import first_fit_decreasing
from tests.tiny import VOCABULARY, tiny

CAPACITY = 64


def by_the_book(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing as textbooks have it: look at each box in turn."""
    boxes: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fits = (box for box in boxes if sum(lengths[other] for other in box) + lengths[index] <= capacity)
        box = next(fits, None)
        if box is None:
            boxes.append(box := [])
        box.append(index)
    return boxes


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, CAPACITY), max_size=80))
def test_rule(lengths: list[int]) -> None:
    boxes = first_fit_decreasing(lengths, CAPACITY)
    assert boxes == by_the_book(lengths, CAPACITY)
    assert sorted(index for box in boxes for index in box) == list(range(len(lengths))), "lost, split or doubled"
    assert all(sum(lengths[index] for index in box) <= CAPACITY for box in boxes)


@pytest.mark.parametrize("lengths", [[0], [CAPACITY + 1], [3, -1]])
def test_lengths_that_fit_no_box(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="expected from 1 to the capacity"):
        first_fit_decreasing(lengths, CAPACITY)


def test_many_short_documents_fill_rows() -> None:
    draw = random.Random(0)
    lengths = [min(1 + int(draw.expovariate(1 / 300)), 2048) for _ in range(2000)]
    rows = first_fit_decreasing(lengths, 2048)
    assert sum(lengths) / (2048 * len(rows)) > 0.99


def document(length: int, seed: int) -> Sample:
    tokens = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    prompt = length // 3
    return Sample(tokens, [IGNORED] * max(prompt, 1) + tokens[max(prompt, 1) :])


DOCUMENTS = [document(length, seed) for seed, length in enumerate((9, 17, 4, 23, 2, 11))]
ROWS = [[DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[2]], [DOCUMENTS[3], DOCUMENTS[4]], [DOCUMENTS[5]]]


def test_layout_of_a_row() -> None:
    one, other = Sample([5, 6, 7], [IGNORED, 6, 7]), Sample([8, 9], [IGNORED, 9])
    batch = packed([[one, other], []], 7, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0], [0] * 7]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, -100], [-100] * 7]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], list(range(7))]
    flat = packed([[one, other], [one]], 7, pad_token_id=0, flat=True)
    assert all(flat[name].shape == (1, 14) for name in ("input_ids", "labels", "position_ids"))


def test_padded_rows() -> None:
    batch = padded([[DOCUMENTS[0]], [DOCUMENTS[1]], []], 8, pad_token_id=0)
    assert all(column.shape == (3, 24) for column in batch.values())
    assert batch["attention_mask"].sum(-1).tolist() == [9, 17, 1]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert (batch["labels"][2] == IGNORED).all()


@pytest.fixture(scope="module", params=["sdpa", "eager", "accelerated"])
def model(request: pytest.FixtureRequest) -> Any:
    made = tiny("llama", attn_implementation="eager" if request.param == "eager" else "sdpa")
    if request.param == "accelerated":
        import automodel_accel

        automodel_accel.apply(made)
    return made


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each token, as transformers shifts them."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )


def alone(model: Any, sample: Sample) -> float:
    labels = torch.tensor([sample.labels])
    logits = model(input_ids=torch.tensor([sample.input_ids])).logits
    return float(losses(logits, labels).sum())


@pytest.mark.parametrize("flat", [False, True])
def test_loss_of_each_document_is_that_of_it_alone(model: Any, flat: bool) -> None:
    batch = packed(ROWS, 40, pad_token_id=0, flat=flat)
    with torch.no_grad():
        logits = model(**without_labels(batch)).logits
        found = torch.nn.functional.pad(losses(logits, batch["labels"]), (1, 0)).view(-1)
        for row, documents in enumerate(ROWS):
            start = row * 40
            for sample in documents:
                stop = start + len(sample.input_ids)
                assert float(found[start:stop].sum()) == pytest.approx(alone(model, sample), rel=1e-5)
                start = stop
            assert not found[start : (row + 1) * 40].any(), "what fills the row carries loss"


def test_loss_and_gradients_are_those_of_padded_rows(model: Any) -> None:
    """Through the model's own loss, which divides by the number of label tokens."""
    found = []
    for batch in (packed(ROWS, 40, 0), padded([[sample] for sample in DOCUMENTS], 8, 0)):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    (packed_loss, packed_gradients), (padded_loss, padded_gradients) = found
    torch.testing.assert_close(packed_loss, padded_loss, rtol=1e-5, atol=0)
    for name, gradient in padded_gradients.items():
        difference = (packed_gradients[name] - gradient).norm() / gradient.norm()
        assert difference < 1e-5, name


def test_no_document_sees_another(model: Any) -> None:
    changed = document(len(ROWS[0][0].input_ids), seed=99)
    with torch.no_grad():
        before = model(**without_labels(packed(ROWS, 40, 0))).logits
        after = model(**without_labels(packed([[changed, *ROWS[0][1:]], *ROWS[1:]], 40, 0))).logits
        leaking = without_labels(packed([[changed, *ROWS[0][1:]], *ROWS[1:]], 40, 0))
        leaking["position_ids"] = torch.arange(40).expand(3, -1)
        seen = model(**leaking).logits
    length = len(changed.input_ids)
    assert not torch.equal(before[0, :length], after[0, :length])
    assert torch.equal(before[0, length:], after[0, length:])
    assert not torch.allclose(seen[0, length:], after[0, length:]), (
        "without restarting positions this test would see a leak"
    )


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: column for name, column in batch.items() if name != "labels"}
