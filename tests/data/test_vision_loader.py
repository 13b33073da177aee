"""The loader of chats with images: every row once, whatever the ranks and however broken the files; and from any place on exactly
what would have followed."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from automodel_accel.data.batches import Batch
from automodel_accel.data.sample import IGNORED
from automodel_accel.data.settings import Batching
from automodel_accel.data.vision import VisionData
from automodel_accel.data.vision_collate import VisionCollate
from automodel_accel.data.vision_loader import VisionLoader, open_vision_data
from automodel_accel.data.vision_settings import Llava
from tests.data.vision_processors import llava, picture

ROWS = 23
PROCESSOR = llava()
COLORS = ("red", "green", "blue")
TWO = Batching(batch_size=2, seq_length=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 rows on three pictures, each with an answer of its own: its number."""
    made = tmp_path_factory.mktemp("questions")
    for color in COLORS:
        picture(color).save(made / f"{color}.png")
    write(made, [row(str(number), COLORS[number % 3]) for number in range(ROWS)])
    return made


def row(answer: str, color: str, question: str = "Which?") -> dict[str, Any]:
    said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": f"{color}.png", "conversations": said}


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")


def opened(
    folder: Path, batching: Batching = TWO, settings: dict[str, Any] | None = None, **placed: Any
) -> VisionLoader:
    return open_vision_data(Llava(path=str(folder), **(settings or {})), PROCESSOR, batching, **placed)


def answers(batches: list[Batch]) -> list[str]:
    """What the rows learn to say, in their order; nothing of those that fill up."""
    rows = [
        ids[labels != IGNORED]
        for batch in batches
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    return [PROCESSOR.tokenizer.decode(ids).removesuffix("<|im_end|>") for ids in rows if len(ids)]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
        for left, right in zip(one, other, strict=True)
    )


ALL = Counter(map(str, range(ROWS)))


@pytest.mark.parametrize("prefetch", [0, 3])
def test_every_row_once_an_epoch_with_its_picture(folder: Path, prefetch: int) -> None:
    loader = opened(folder, Batching(batch_size=2, seq_length=256, prefetch=prefetch))
    batches = list(loader)
    assert len(batches) == len(loader) == 12
    assert Counter(answers(batches)) == ALL
    shades = {color: VisionCollate(PROCESSOR)([chat_of(folder, color)])["pixel_values"][0] for color in COLORS}
    shown = torch.cat([batch["pixel_values"] for batch in batches])
    for answer, pixels in zip(answers(batches), shown, strict=False):  # the last picture fills up
        assert torch.equal(pixels, shades[COLORS[int(answer) % 3]])


def chat_of(folder: Path, color: str) -> Any:
    return VisionData(Llava(path=str(folder)))[COLORS.index(color)]


def test_epochs_differ_and_runs_do_not(folder: Path) -> None:
    twice = list(opened(folder, epochs=2))
    said = answers(twice)
    assert len(twice) == 23, "an epoch goes over into the next one in the middle of a batch"
    assert Counter(said[:ROWS]) == Counter(said[ROWS:]) == ALL
    assert said[:ROWS] != said[ROWS:]
    assert same(twice, list(opened(folder, epochs=2)))
    assert answers(list(opened(folder, settings={"seed": 1}))) != said[:ROWS]


def test_rows_in_their_order(folder: Path) -> None:
    loader = opened(folder, settings={"shuffle": False, "limit": 7}, epochs=2)
    assert answers(list(loader)) == [*map(str, range(7))] * 2


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_share_the_rows_of_one(folder: Path, size: int) -> None:
    ranks = [list(opened(folder, data_rank=rank, data_size=size)) for rank in range(size)]
    whole = answers(list(opened(folder)))
    assert len({len(batches) for batches in ranks}) == 1, "a rank with fewer batches leaves the others waiting"
    assert len(ranks[0]) == len(opened(folder, data_size=size))
    shared = [answers([batches[at]]) for at in range(len(ranks[0])) for batches in ranks]
    assert [said for part in shared for said in part] == whole, "rank r takes the r-th rows of each step"


def test_a_last_batch_is_filled_up_with_rows_without_labels(folder: Path) -> None:
    ranks = [opened(folder, settings={"limit": 5}, data_rank=rank, data_size=2) for rank in (0, 1)]
    batches = [list(loader) for loader in ranks]
    assert [[len(answers([one])) for one in each] for each in batches] == [[2, 1], [2, 0]]
    assert {len(one["input_ids"]) for each in batches for one in each} == {2}, "every batch has as many rows"
    assert all(len(one["pixel_values"]) == 2 for each in batches for one in each)
    assert [loader.filled.documents for loader in ranks] == [3, 2]
    assert ranks[0].filled.rows == 4
    tokens = [int(one["attention_mask"][one["labels"].ne(IGNORED).any(1)].sum()) for one in batches[0]]
    assert ranks[0].filled.tokens == sum(tokens)


def test_resumes_with_exactly_what_would_have_followed(folder: Path) -> None:
    """At the beginning, in the middle of an epoch, at the batch that holds its end, behind it, and at the very end."""
    whole = list(opened(folder, epochs=2))
    for stop in (0, 1, 5, 11, 12, 22, 23):
        first = opened(folder, epochs=2)
        batches = iter(first)
        for _ in range(stop):
            next(batches)
        state = json.loads(json.dumps(first.state_dict()))
        batches.close()
        second = opened(folder, epochs=2)
        second.load_state_dict(state)
        assert same(list(second), whole[stop:]), f"stopped behind batch {stop}"


@pytest.mark.parametrize("before", [1, 2])
def test_resumes_with_another_number_of_ranks(folder: Path, before: int) -> None:
    """Nothing twice, nothing left out."""
    first = [opened(folder, data_rank=rank, data_size=before) for rank in range(before)]
    given = []
    for loader in first:
        batches = iter(loader)
        given += [next(batches) for _ in range(3)]
        batches.close()
    states = [loader.state_dict() for loader in first]
    assert all(state == states[0] for state in states), "the state of any rank serves all"
    rest = []
    for rank in range(3):
        loader = opened(folder, data_rank=rank, data_size=3)
        loader.load_state_dict(states[0])
        rest += list(loader)
    assert Counter(answers(given)) + Counter(answers(rest)) == ALL


def test_state_does_not_run_ahead_with_the_thread(folder: Path) -> None:
    ahead, at_once = (opened(folder, Batching(batch_size=2, seq_length=256, prefetch=number)) for number in (8, 0))
    for loader in (ahead, at_once):
        next(iter(loader))
    assert ahead.state_dict() == at_once.state_dict()


def test_an_iteration_that_was_left_goes_on_and_an_ended_one_begins_again(folder: Path) -> None:
    loader = opened(folder)
    whole = list(loader)
    assert same(list(loader), whole)
    for batch in loader:
        assert same([batch], whole[:1])
        break
    assert same(list(loader), whole[1:])


def test_endless(folder: Path) -> None:
    loader = opened(folder, settings={"limit": 3}, epochs=None)
    batches = iter(loader)
    taken = [next(batches) for _ in range(10)]
    assert loader.epoch == 6
    assert Counter(answers(taken[:9])) == Counter({str(number): 6 for number in range(3)})
    with pytest.raises(TypeError, match="no end"):
        len(loader)
    batches.close()


def test_state_of_other_data_is_refused(folder: Path) -> None:
    state = opened(folder).state_dict()
    with pytest.raises(ValueError, match=r"was \{'rows': 23.* and is \{'rows': 7"):
        opened(folder, settings={"limit": 7}).load_state_dict(state)


@pytest.mark.parametrize(("rank", "size", "epochs"), [(2, 2, 1), (-1, 1, 1), (0, 1, 0)])
def test_ranks_and_epochs_that_there_are_not(folder: Path, rank: int, size: int, epochs: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        opened(folder, data_rank=rank, data_size=size, epochs=epochs)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """Row 2 is too long, row 5 has a picture that does not decode, row 8 one that there is not."""
    rows = [row(str(number), COLORS[number % 3]) for number in range(12)]
    rows[2] = row("2", "red", "long " * 200)
    rows[5]["image"], rows[8]["image"] = "cut.png", "none.png"
    for color in COLORS:
        picture(color).save(tmp_path / f"{color}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:50])
    write(tmp_path, rows)
    return tmp_path


def test_rows_that_cannot_be_used_are_replaced_by_the_next_ones(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "automodel_accel"):
        loader = opened(broken, settings={"shuffle": False}, epochs=2)
        said = answers(list(loader))
    assert said == [str({2: 3, 5: 6, 8: 9}.get(number, number)) for number in range(12)] * 2
    assert loader.data.skipped == 3
    assert [number for number in (2, 5, 8) if f"row {number} is left out" in caplog.text] == [2, 5, 8]
    assert caplog.text.count("is left out") == 3, "each is said once"


def test_ranks_agree_on_rows_that_cannot_be_used(broken: Path) -> None:
    whole = answers(list(opened(broken)))
    ranks = [list(opened(broken, data_rank=rank, data_size=2)) for rank in (0, 1)]
    assert [said for step in zip(*ranks, strict=True) for said in answers(list(step))] == whole


def test_strict_stops_at_a_sample_that_is_too_long(broken: Path) -> None:
    rows = json.loads((broken / "train.json").read_text(encoding="utf-8"))
    write(broken, rows[:5])
    with pytest.raises(ValueError, match=r"row 2: a sample has \d+ tokens, max_length is 256 \(strict: true\)"):
        list(opened(broken, settings={"strict": True}))


def test_a_sample_runs_through_the_processor_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    by_text = VisionCollate._by_text

    def counted(self: VisionCollate, chats: Any) -> Any:
        calls.append(len(chats))
        return by_text(self, chats)

    monkeypatch.setattr(VisionCollate, "_by_text", counted)
    list(opened(folder, Batching(batch_size=4, seq_length=256)))
    assert calls == [4] * 6


@pytest.mark.parametrize(
    ("cache_mb", "times"), [pytest.param(1, 3, id="three pictures"), pytest.param(0, ROWS, id="nothing is kept")]
)
def test_pictures_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch, cache_mb: int, times: int) -> None:
    decoded: list[Path] = []
    from automodel_accel.data import vision_images

    opens = vision_images.open_image
    monkeypatch.setattr(vision_images, "open_image", lambda file: decoded.append(file) or opens(file))
    loader = opened(folder, Batching(batch_size=1, seq_length=256), settings={"cache_mb": cache_mb})
    assert Counter(answers(list(loader))) == ALL
    assert len(decoded) == times


def test_a_kept_picture_is_nobody_elses(folder: Path) -> None:
    data = VisionData(Llava(path=str(folder)))
    for _ in range(3):
        image = data[0][0]["content"][0]["image"]
        assert image.getpixel((0, 0)) == (255, 0, 0)
        image.paste((0, 0, 0), (0, 0, *image.size))


def test_what_is_kept_has_a_limit(tmp_path: Path) -> None:
    for color in COLORS:
        picture(color, (500, 500)).save(tmp_path / f"{color}.png")  # 0.72 MiB each
    write(tmp_path, [row(color, color) for color in COLORS])
    data = VisionData(Llava(path=str(tmp_path), cache_mb=1))
    for number in (0, 1, 2):
        data[number]
    assert len(data._decoded._images) == 1
    with pytest.raises(ValueError, match="cache_mb=-1"):
        Llava(path=str(tmp_path), cache_mb=-1)
