"""The loader: every row once, whatever the ranks; and from any place on exactly what would have followed."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from automodel_accel.data import IGNORED, Batching, Loader, MockData, TextData, open_data
from tests.data import tokenizers_made as by

datasets = pytest.importorskip("datasets")
WORDS = [
    "the",
    "capital",
    "of",
    "France",
    "is",
    "Paris",
    "and",
    "Rome",
    "a",
    "city",
    "in",
    "Italy",
    "two",
    "men",
    "on",
    "roof",
]


def document(number: int) -> str:
    length = 1 + (number * 7) % 23
    return " ".join([str(number), *(WORDS[(number + step) % len(WORDS)] for step in range(length))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of 2 to 24 words, in three files."""
    made = tmp_path_factory.mktemp("texts")
    for part in range(3):
        lines = [json.dumps({"text": document(number)}) for number in range(part * 100, part * 100 + 100)]
        (made / f"part{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return made


TOKENIZER = by.made(None, eos="</s>")
SHAPES = {
    "packed": Batching(seq_length=64, batch_size=2, window=90),
    "packed, made when asked for": Batching(seq_length=64, batch_size=2, window=90, prefetch=0),
    "padded": Batching(seq_length=64, batch_size=2, window=90, packing=False),
    "grouped": Batching(seq_length=64, batch_size=2, window=90, packing=False, group_by_length=True),
}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows an epoch, each of several chunks."""
    monkeypatch.setattr("automodel_accel.data.windows.TOKENS_OF_ROWS", 4)
    monkeypatch.setattr("automodel_accel.data.windows.CHUNK", 32)


def opened(folder: Path, batching: Batching, streaming: bool = False, **options: Any) -> Loader:
    settings = TextData(path=str(folder), streaming=streaming, **options.pop("settings", {}))
    return open_data(settings, TOKENIZER, batching, **options)


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        left.keys() == right.keys()
        and all(torch.equal(torch.as_tensor(left[key]), torch.as_tensor(right[key])) for key in left)
        for left, right in zip(one, other, strict=True)
    )


def documents_in(batches: list[dict[str, Any]]) -> Counter[str]:
    """The documents of batches, as text."""
    found: Counter[str] = Counter()
    for batch in batches:
        for row in batch["input_ids"].tolist():
            texts = TOKENIZER.decode(row, clean_up_tokenization_spaces=False).replace("<pad>", "").split("</s>")
            found.update(filter(None, texts))
    return found


ALL = Counter(document(number) for number in range(300))
STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["at hand", "streamed"])


@STREAMING
@pytest.mark.parametrize("shape", SHAPES)
def test_every_document_once_an_epoch(folder: Path, shape: str, streaming: bool) -> None:
    loader = opened(folder, SHAPES[shape], streaming)
    batches = list(loader)
    assert documents_in(batches) == ALL
    assert loader.filled.documents == 300
    assert loader.filled.label_tokens == sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    assert loader.counts.samples == loader.counts.rows == 300
    if not streaming:
        assert len(loader) == len(batches)


@STREAMING
@pytest.mark.parametrize("shape", SHAPES)
def test_epochs_differ_and_runs_do_not(folder: Path, shape: str, streaming: bool) -> None:
    twice = list(opened(folder, SHAPES[shape], streaming, epochs=2))
    assert documents_in(twice) == ALL + ALL
    assert same(twice, list(opened(folder, SHAPES[shape], streaming, epochs=2)))
    assert not same(twice[: len(twice) // 2], twice[len(twice) // 2 :])
    assert not same(twice, list(opened(folder, SHAPES[shape], streaming, epochs=2, settings={"seed": 1})))


@STREAMING
def test_rows_in_their_order(folder: Path, streaming: bool) -> None:
    loader = opened(folder, SHAPES["padded"], streaming, settings={"shuffle": False, "limit": 7})
    assert [document for batch in loader for document in documents_in([batch])] == [
        document(number) for number in range(7)
    ]


@STREAMING
@pytest.mark.parametrize("shape", SHAPES)
def test_resumes_with_exactly_what_would_have_followed(folder: Path, shape: str, streaming: bool) -> None:
    """Wherever it stopped: in the first window and in later ones, at edges of windows and epochs, and at the very end."""
    whole = list(opened(folder, SHAPES[shape], streaming, epochs=2))
    for stop in {1, 2, 5, len(whole) // 2 - 1, len(whole) // 2, len(whole) // 2 + 1, len(whole) - 1, len(whole)}:
        first = opened(folder, SHAPES[shape], streaming, epochs=2)
        batches = iter(first)
        for _ in range(stop):
            next(batches)
        state = json.loads(json.dumps(first.state_dict()))
        batches.close()
        second = opened(folder, SHAPES[shape], streaming, epochs=2)
        second.load_state_dict(state)
        assert same(list(second), whole[stop:]), f"stopped behind batch {stop}"


def test_state_does_not_run_ahead_with_the_thread(folder: Path) -> None:
    ahead, at_once = (opened(folder, Batching(seq_length=64, prefetch=number)) for number in (8, 0))
    for loader in (ahead, at_once):
        next(iter(loader))
    assert ahead.state_dict() == at_once.state_dict()


def test_an_iteration_that_was_left_goes_on_and_an_ended_one_begins_again(folder: Path) -> None:
    loader = opened(folder, SHAPES["packed"])
    whole = list(loader)
    assert same(list(loader), whole)
    for batch in loader:
        assert same([batch], whole[:1])
        break
    assert same(list(loader), whole[1:])


@STREAMING
@pytest.mark.parametrize("shape", ["packed", "padded"])
def test_ranks_share_the_rows_of_one(folder: Path, shape: str, streaming: bool) -> None:
    one = list(opened(folder, Batching(**{**as_dict(SHAPES[shape]), "batch_size": 6}), streaming))
    ranks = [list(opened(folder, SHAPES[shape], streaming, data_rank=rank, data_size=3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1, "a rank with fewer batches leaves the others waiting"
    assert len(ranks[0]) == len(one)
    assert sum((documents_in(batches) for batches in ranks), Counter()) == ALL
    if shape == "packed":
        for number, batch in enumerate(one):
            parts = torch.cat([batches[number]["input_ids"] for batches in ranks])
            assert torch.equal(parts[: len(batch["input_ids"])], batch["input_ids"])


def as_dict(batching: Batching) -> dict[str, Any]:
    return {name: getattr(batching, name) for name in batching.__dataclass_fields__}


@STREAMING
@pytest.mark.parametrize("before", [1, 2])
def test_resumes_with_another_number_of_ranks(folder: Path, before: int, streaming: bool) -> None:
    """Nothing twice, nothing left out: the second run goes on behind the last row that any rank of the first one was given."""
    shape = SHAPES["packed"]
    first = [opened(folder, shape, streaming, data_rank=rank, data_size=before) for rank in range(before)]
    given = []
    for loader in first:
        batches = iter(loader)
        given += [next(batches) for _ in range(3)]
        batches.close()
    states = [loader.state_dict() for loader in first]
    assert all(state == states[0] for state in states), "the state of any rank serves all"
    rest = []
    for rank in range(3):
        loader = opened(folder, shape, streaming, data_rank=rank, data_size=3)
        loader.load_state_dict(states[0])
        rest += list(loader)
    assert documents_in(given) + documents_in(rest) == ALL


def test_a_last_batch_is_filled_up_with_rows_without_labels() -> None:
    mock = MockData(vocab_size=50, samples=5)
    ranks = [
        open_data(mock, None, Batching(seq_length=16, batch_size=2), data_rank=rank, data_size=2) for rank in (0, 1)
    ]
    shapes = [[int((batch["labels"] != IGNORED).any(-1).sum()) for batch in loader] for loader in ranks]
    assert shapes == [[2, 1], [2, 0]]


def test_endless() -> None:
    loader = open_data(MockData(vocab_size=50, samples=3), None, Batching(seq_length=8), epochs=None)
    batches = iter(loader)
    taken = [next(batches)["input_ids"] for _ in range(10)]
    assert loader.epoch == 3
    assert len({tuple(batch.view(-1).tolist()) for batch in taken}) == 3
    with pytest.raises(TypeError, match="no end"):
        len(loader)
    batches.close()


def test_state_of_other_data_is_refused(folder: Path) -> None:
    state = opened(folder, SHAPES["packed"]).state_dict()
    other = opened(folder, Batching(seq_length=128, batch_size=2, window=90), settings={"limit": 200, "shuffle": False})
    with pytest.raises(
        ValueError,
        match=r"samples was 300 and is 200; seq_length was 64 and is 128; shuffle was True and is False; tokens was",
    ):
        other.load_state_dict(state)


def test_errors_of_the_thread_arrive(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": 2}', encoding="utf-8")
    loader = opened(tmp_path, Batching(seq_length=8), True, settings={"strict": True})
    with pytest.raises(ValueError, match=r"row 1: no text in column 'text': 2 \(strict"):
        list(loader)


def test_a_stream_without_a_sample_ends(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"text": " "}', encoding="utf-8")
    with pytest.raises(ValueError, match="2 left out, empty text"):
        list(opened(tmp_path, Batching(seq_length=8), True, epochs=None))


def test_grouped_batches_pad_less(folder: Path) -> None:
    fills = []
    for shape in ("padded", "grouped", "packed"):
        loader = opened(folder, SHAPES[shape])
        list(loader)
        fills.append(loader.filled.fill)
    assert fills[0] < fills[1] < fills[2]


@pytest.mark.parametrize(("rank", "size", "epochs"), [(2, 2, 1), (-1, 1, 1), (0, 1, 0)])
def test_ranks_and_epochs_that_there_are_not(rank: int, size: int, epochs: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        open_data(
            MockData(vocab_size=5, samples=3),
            None,
            Batching(seq_length=8),
            data_rank=rank,
            data_size=size,
            epochs=epochs,
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"seq_length": 1},
        {"batch_size": 0},
        {"group_by_length": True},
        {"packing": False, "flat": True},
        {"prefetch": -1},
    ],
)
def test_batchings_that_there_are_not(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected at least|leave it out"):
        Batching(**wrong)
