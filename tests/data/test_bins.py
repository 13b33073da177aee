"""Token bins and mock data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from automodel_accel.data import IGNORED, Batching, BinData, MockData, open_data
from automodel_accel.data.bins import FINEWEB, SIZED

TOKENS = np.arange(1000, 1100)


def written(file: Path, kind: str) -> Path:
    header = np.zeros(256, "<i4")
    header[:4] = {"fineweb": (FINEWEB, 1, 100, 0), "sized": (SIZED, 1, 100, 4)}.get(kind, (0, 0, 0, 0))
    if kind == "npy":
        np.save(file.with_suffix(".npy"), TOKENS.astype(np.uint32))
        return file.with_suffix(".npy")
    dtype = {"sized": np.uint32, "plain32": np.uint32}.get(kind, np.uint16)
    head = header.tobytes() if kind in ("fineweb", "sized") else b""
    file.write_bytes(head + TOKENS.astype(dtype).tobytes())
    return file


@pytest.mark.parametrize("kind", ["fineweb", "sized", "plain16", "plain32", "npy"])
def test_files(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path / "tokens.bin", kind)
    settings = BinData(path=str(file), shuffle=False, dtype="uint32" if kind == "plain32" else "uint16")
    batches = list(open_data(settings, None, Batching(seq_length=16, batch_size=2)))
    rows = [row for batch in batches for row in batch["input_ids"].tolist()]
    assert rows == TOKENS[:96].reshape(6, 16).tolist()
    assert batches[0]["labels"][1].tolist() == [IGNORED, *range(1017, 1032)]
    assert batches[0]["position_ids"][1].tolist() == list(range(16))


def test_folders_patterns_and_limits(tmp_path: Path) -> None:
    for number in range(3):
        written(tmp_path / f"train{number}.bin", "fineweb")
    written(tmp_path / "val.bin", "fineweb")
    batching = Batching(seq_length=30)
    assert len(open_data(BinData(path=str(tmp_path)), None, batching)) == 12
    assert len(open_data(BinData(path=str(tmp_path / "train*.bin")), None, batching)) == 9
    limited = list(open_data(BinData(path=str(tmp_path), limit=4, shuffle=False), None, batching))
    assert [int(batch["input_ids"][0, 0]) for batch in limited] == [1000, 1030, 1060, 1000]


def test_documents_in_a_row(tmp_path: Path) -> None:
    file = tmp_path / "tokens.bin"
    np.array([5, 6, 0, 7, 8, 9, 0, 0, 3, 4, 5, 0], np.uint16).tofile(file)
    loader = open_data(BinData(path=str(file), document_end=0, shuffle=False), None, Batching(seq_length=6))
    first, second = loader
    assert first["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert first["labels"].tolist() == [[IGNORED, 6, 0, IGNORED, 8, 9]]
    assert second["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3]]
    assert second["labels"].tolist() == [[IGNORED, IGNORED, IGNORED, 4, 5, 0]]
    with pytest.raises(ValueError, match="set packing: true"):
        open_data(BinData(path=str(file), document_end=0), None, Batching(seq_length=6, packing=False))


def test_files_that_are_no_bins(tmp_path: Path) -> None:
    def said(data: bytes, **settings: Any) -> str:
        (tmp_path / "x.bin").write_bytes(data)
        with pytest.raises(ValueError, match="path") as error:
            open_data(BinData(path=str(tmp_path / "x.bin"), **settings), None, Batching(seq_length=4))
        return str(error.value)

    header = np.array([FINEWEB, 1, 100, 0] + [0] * 252, "<i4")
    assert "its header says 100 tokens of 2 bytes, but 20 bytes follow; it is cut off" in said(
        header.tobytes() + bytes(20)
    )
    header[1] = 2
    assert "a header of version 2" in said(header.tobytes() + bytes(200))
    assert "3 bytes, which is no number of tokens of uint16" in said(bytes(3))
    assert "6 bytes, which is no number of tokens of uint32" in said(bytes(6), dtype="uint32")
    assert "0 bytes" in said(b"")
    assert "3 tokens in 1 files, none of which fills a row of seq_length 4" in said(bytes(6))
    np.save(tmp_path / "x.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"an array of float64, \(2, 2\)"):
        open_data(BinData(path=str(tmp_path / "x.npy")), None, Batching(seq_length=4))
    (tmp_path / "x.npy").write_bytes(b"no")
    with pytest.raises(ValueError, match="is no array of numpy"):
        open_data(BinData(path=str(tmp_path / "x.npy")), None, Batching(seq_length=4))
    with pytest.raises(ValueError, match="no such file"):
        open_data(BinData(path=str(tmp_path / "none*.bin")), None, Batching(seq_length=4))


def test_mock_data_is_the_same_for_the_same_seed() -> None:
    def tokens(**settings: Any) -> list[list[int]]:
        loader = open_data(MockData(vocab_size=50, samples=9, **settings), None, Batching(seq_length=32))
        return [batch["input_ids"].view(-1).tolist() for batch in loader]

    assert tokens() == tokens()
    assert tokens() != tokens(seed=1)
    full = open_data(MockData(vocab_size=50, samples=9), None, Batching(seq_length=32))
    assert all(0 <= token < 50 for batch in full for token in batch["input_ids"].view(-1).tolist())
    assert full.filled.fill == 1.0
    assert len(open_data(MockData(vocab_size=50, samples=9, shortest=2), None, Batching(seq_length=32))) < 9


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"shortest": 1}, "at least"), ({"samples": 0}, "at least"), ({"shortest": 33}, "33, but a row holds 32")],
)
def test_mock_data_that_there_is_not(settings: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_data(MockData(vocab_size=50, **settings), None, Batching(seq_length=32))
