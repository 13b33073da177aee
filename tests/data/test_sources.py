"""Rows from files of all kinds, and what is said of paths and files that give none."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from automodel_accel.data import ChatData, SquadData, TextData
from automodel_accel.data.opening import check_columns
from automodel_accel.data.sources import RowStream, is_streamed, open_rows
from automodel_accel.kernels.facts import Facts, this_machine

datasets = pytest.importorskip("datasets")
ROWS = [{"text": "one", "number": 1}, {"text": "two", "number": 2}, {"text": "three", "number": 3}]
LINES = "\n".join(map(json.dumps, ROWS))


def written(folder: Path, name: str) -> Path:
    file = folder / name
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(ROWS).to_parquet(str(file))
    elif name.endswith(".csv"):
        file.write_text("text,number\none,1\ntwo,2\nthree,3\n", encoding="utf-8")
    elif name.endswith(".json"):
        file.write_text(json.dumps(ROWS), encoding="utf-8")
    elif name.endswith(".gz"):
        file.write_bytes(gzip.compress(LINES.encode()))
    else:
        file.write_text(LINES, encoding="utf-8")
    return file


def rows_of(path: Path, **settings: Any) -> list[dict[str, Any]]:
    rows = open_rows(TextData(path=str(path), **settings))
    return [dict(row) for row in (RowStream(rows).read() if is_streamed(rows) else rows)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.csv", "rows.jsonl.gz"])
def test_files(tmp_path: Path, name: str, streaming: bool) -> None:
    file = written(tmp_path, name)
    assert rows_of(file, streaming=streaming) == ROWS
    assert rows_of(tmp_path, streaming=streaming, limit=2) == ROWS[:2]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("three", encoding="utf-8")
    assert rows_of(tmp_path) == [{"text": "one\n\ntwo\n"}, {"text": "three"}]


def test_files_of_splits(tmp_path: Path) -> None:
    for name, text in (("train-0.jsonl", "a"), ("train-1.jsonl", "b"), ("dev.jsonl", "c")):
        (tmp_path / name).write_text(json.dumps({"text": text}), encoding="utf-8")
    assert [row["text"] for row in rows_of(tmp_path)] == ["a", "b"]
    assert [row["text"] for row in rows_of(tmp_path, split="validation")] == ["c"]
    with pytest.raises(ValueError, match=r"named after the split 'test'; there are files of train, validation"):
        rows_of(tmp_path, split="test")


def test_part_of_a_split_and_a_saved_data_set(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path, "rows.jsonl"), split="train[:2]") == ROWS[:2]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    assert rows_of(tmp_path / "saved") == rows_of(tmp_path / "saved", streaming=True) == ROWS
    with pytest.raises(ValueError, match="no split 'test'; there are train"):
        rows_of(tmp_path / "saved", split="test")


SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Rome",
            "paragraphs": [
                {
                    "context": "Rome is in Italy.",
                    "qas": [
                        {"id": "1", "question": "Where is Rome?", "answers": [{"text": "Italy", "answer_start": 11}]},
                        {"id": "2", "question": "Who?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def test_official_file_of_squad(tmp_path: Path) -> None:
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(SQUAD), encoding="utf-8")
    rows = open_rows(SquadData(path=str(tmp_path / "dev-v1.1.json")))
    first = {"id": "1", "title": "Rome", "context": "Rome is in Italy.", "question": "Where is Rome?"}
    assert rows[0] == {**first, "answers": {"text": ["Italy"], "answer_start": [11]}}
    assert rows[1]["answers"] == {"text": [], "answer_start": []}
    (tmp_path / "dev-v1.1.json").write_text('{"data": [{"title": "Rome"}]}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"not their paragraphs and qas inside \(KeyError\('paragraphs'\)\)"):
        open_rows(SquadData(path=str(tmp_path / "dev-v1.1.json")))


@pytest.mark.parametrize(
    ("files", "settings", "said"),
    [
        ({}, {"path": "no/such/rows.jsonl"}, r"no/such/rows.jsonl: does not exist; .* does"),
        ({}, {"path": "rows.jsonl"}, r"rows.jsonl: does not exist"),
        ({}, {"path": "."}, r"holds no file that ends in .json"),
        ({"rows.xml": "<a/>"}, {"path": "rows.xml"}, r"cannot be read; expected a name that ends in .json"),
        ({"a.csv": "x", "b.txt": "x"}, {"path": "."}, r"files of several kinds \(csv, text\)"),
        ({"rows.jsonl": ""}, {"path": "rows.jsonl"}, r"rows.jsonl, split train: "),
        ({"rows.json": "[]"}, {"path": "rows.json"}, r"rows.json, split train: "),
        ({"rows.jsonl": '{"text": 1}\n{no'}, {"path": "rows.jsonl"}, r"rows.jsonl, split train: JSON parse error"),
        ({"rows.parquet": "PAR"}, {"path": "rows.parquet"}, r"rows.parquet, split train: .*[Pp]arquet"),
        (
            {},
            {"path": "nobody/nothing"},
            r"path nobody/nothing, split train: no such local path; as a data set of the hub: .*Hub",
        ),
    ],
)
def test_paths_that_give_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], settings: dict[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        open_rows(TextData(**settings))


def test_a_table_without_a_needed_column(tmp_path: Path) -> None:
    file = written(tmp_path, "rows.jsonl")
    settings = ChatData(path=str(file))
    with pytest.raises(ValueError, match=r"no column 'messages'; there are 'text', 'number'"):
        check_columns(settings, open_rows(settings), ("messages",))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = this_machine()
    without = Facts(**{**{name: getattr(machine, name) for name in Facts.__slots__}, "packages": {}})
    monkeypatch.setattr("automodel_accel.data.sources.this_machine", lambda: without)
    with pytest.raises(ValueError, match=r"pip install automodel-accel\[data\]"):
        open_rows(TextData(path="some/thing"))


def test_limits_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="limit is 0"):
        TextData(path="x", limit=0)
