"""Vision-language data sets from local files: every schema, images that are broken or missing, and what takes their place."""

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from automodel_accel.data.vision import NAMED, VisionData
from automodel_accel.data.vision_chats import BadSample
from automodel_accel.data.vision_settings import CordV2, ImageChat, Llava, MedPix, Rdr, VisionSettings
from automodel_accel.recipes.filling import fill
from automodel_accel.recipes.reading import parse
from tests.data.vision_processors import picture

COLORS = ("red", "green", "blue")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for color in COLORS:
        picture(color).save(tmp_path / "pictures" / f"{color}.png")
    (tmp_path / "pictures" / "text.png").write_text("no image", encoding="utf-8")
    whole = (tmp_path / "pictures" / "red.png").read_bytes()
    (tmp_path / "pictures" / "cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def llava(folder: Path, *images: str, **settings: Any) -> Llava:
    """A file with one row an image: the question and the answer are its name."""
    rows = [
        {"image": name, "conversations": [{"from": "human", "value": "<image>\nName?"}, {"from": "gpt", "value": name}]}
        for name in images
    ]
    file = folder / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return Llava(path=str(file), images=folder / "pictures", **settings)


def answer(chat: list[dict[str, Any]]) -> str:
    return str(chat[-1]["content"][0]["text"])


def shown(chat: list[dict[str, Any]]) -> Any:
    return chat[0]["content"][0]["image"]


ROWS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "cord_v2": lambda image: {"image": image, "ground_truth": json.dumps({"gt_parse": {"total": "1"}})},
    "rdr": lambda image: {"image": image, "text": "A chair."},
    "medpix": lambda image: {"image_id": image, "question": "Which organ?", "answer": "The lung."},
}
KINDS = {"cord_v2": CordV2, "rdr": Rdr, "medpix": MedPix}


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_a_set_of_the_hub_is_read_from_jsonl_and_from_parquet_alike(kind: str, folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    lines = [json.dumps(ROWS[kind](f"pictures/{color}.png")) for color in COLORS]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = datasets.Dataset.from_list([ROWS[kind](str(folder / "pictures" / f"{color}.png")) for color in COLORS])
    column = "image_id" if kind == "medpix" else "image"
    made = made.cast_column(column, datasets.Image())
    (folder / "data").mkdir()
    made.to_parquet(folder / "data" / "train-00000-of-00001.parquet", batch_size=10)
    for path in ("rows.jsonl", "data/train-00000-of-00001.parquet", "data"):
        data = VisionData(KINDS[kind](path=str(folder / path)))
        assert len(data) == 3
        assert [shown(data[number]).getpixel((0, 0)) for number in range(3)] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert len(VisionData(KINDS[kind](path=str(folder / "data"), limit=2))) == 2


def test_image_chat_reads_bytes_and_grey_pictures_as_rgb(folder: Path) -> None:
    pytest.importorskip("datasets")
    buffer = io.BytesIO()
    picture("white").convert("L").save(buffer, "PNG")
    (folder / "grey.png").write_bytes(buffer.getvalue())
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "White."}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages, "images": ["grey.png"]}), encoding="utf-8")
    chat = VisionData(ImageChat(path=str(folder / "rows.jsonl")))[0]
    assert (shown(chat).mode, shown(chat).getpixel((0, 0))) == ("RGB", (255, 255, 255))


def test_a_broken_image_is_counted_named_and_replaced(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = VisionData(llava(folder, "red.png", "cut.png", "text.png", "blue.png", "absent.png"))
    assert data.skipped == 1  # the one that is not there, found without decoding any
    assert "absent.png does not exist" in caplog.text
    assert [answer(data[number]) for number in range(5)] == ["red.png", "blue.png", "blue.png", "blue.png", "red.png"]
    assert data.skipped == 3
    for name in ("cut.png", "text.png"):
        assert f"{name} does not decode" in caplog.text


def test_check_decodes_all(folder: Path) -> None:
    data = VisionData(llava(folder, "red.png", "cut.png", "text.png"))
    assert (data.skipped, data.check(), data.skipped) == (0, 2, 2)


@pytest.mark.parametrize(("name", "why"), [("absent.png", "does not exist"), ("cut.png", "does not decode")])
def test_strict_stops_at_the_first(folder: Path, name: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"row 1: .*{name} {why}"):
        VisionData(llava(folder, "red.png", name, strict=True)).check()


def test_only_the_first_bad_rows_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = VisionData(llava(folder, "red.png", *["absent.png"] * (NAMED + 3)))
    assert data.skipped == NAMED + 3
    assert caplog.text.count("does not exist") == NAMED


def test_no_usable_row_stops(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="none of its 2 rows can be used"):
        VisionData(llava(folder, "cut.png", "absent.png"))[0]


def names(chats: list[Any]) -> list[str]:
    return [answer(chat) for chat in chats]


def test_workers_share_what_they_found(folder: Path) -> None:
    data = VisionData(llava(folder, "red.png", "cut.png", "blue.png", "cut.png"))
    loader = DataLoader(data, batch_size=1, num_workers=2, collate_fn=names, multiprocessing_context="fork")
    assert [name for batch in loader for name in batch] == ["red.png", "blue.png", "blue.png", "red.png"]
    assert data.skipped == 2


class Longest:
    """Refuses what is longer than `most` characters."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked = 0

    def check(self, chat: Any) -> None:
        self.asked += 1
        if len(answer(chat)) > self.most:
            raise BadSample("too long")

    def __call__(self, chats: list[Any]) -> None:
        raise AssertionError


def test_what_does_not_fit_is_replaced_and_asked_for_once(folder: Path) -> None:
    longest = Longest(8)
    data = VisionData(llava(folder, "green.png", "red.png")).fitting(longest)
    for _ in range(2):
        assert [answer(data[number]) for number in range(2)] == ["red.png", "red.png"]
    assert (data.skipped, longest.asked) == (1, 2)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("rows.json", None, "no such file"),
        ("rows.json", b"{", "not JSON: .*line 1, column 2"),
        ("rows.jsonl", b"{}\n[", "line 2: not JSON"),
        ("rows.json", b'{"a": 1}', "expected a list of rows"),
        ("rows.jsonl", b"3", "expected a list of rows"),
        ("rows.json", b"[]", "no rows"),
        ("rows.json", b"\xff", "byte 0 is not UTF-8"),
        ("rows.parquet", b"PAR", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    if name.endswith("parquet"):
        pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=why):
        VisionData(Llava(path=str(tmp_path / name)))


def test_urls_are_not_fetched(folder: Path) -> None:
    with pytest.raises(ValueError, match="no local file; download"):
        VisionData(llava(folder, "https://example.com/a.png", strict=True))


def test_a_recipe_tells_the_kinds_apart() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Recipe:
        data: VisionSettings

    Recipe.__annotations__["data"] = VisionSettings  # a class inside of a function: its hints are not looked up by name
    filled = fill(Recipe, parse("data: {kind: medpix, limit: 3, images: pictures}", "recipe.yaml"))
    assert filled.data == MedPix(limit=3, images=Path("pictures"))
    with pytest.raises(ValueError, match="limit=0"):
        fill(Recipe, parse("data: {kind: llava, path: a.json, limit: 0}", "recipe.yaml"))


def test_verdicts_are_shared_memory(folder: Path) -> None:
    data = VisionData(llava(folder, "red.png"))
    assert data._verdicts.is_shared()
    assert data._verdicts.dtype is torch.uint8
