"""Token bins: tokens in files, mapped into memory; a sample is a row of them."""

import glob
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from automodel_accel.data.sample import IGNORED, Sample
from automodel_accel.data.settings import BinData

HEADER = 256  # numbers of 4 bytes: magic, version, tokens, bytes a token
FINEWEB, SIZED = (
    20240520,
    278895051,
)  # magic numbers of nanoGPT's scripts: tokens of 2 bytes; of as many as the header says
VERSION = 1
DTYPES = {2: np.uint16, 4: np.uint32}


class TokenBins:
    """Rows of `seq_length` tokens, in the order of the files and of what stands in them.

    What is left at the end of a file and fills no row is left out. The first token of a row carries no loss, for nothing comes
    before it.

    Args:
        settings: Which files.
        seq_length: Tokens a row.

    Raises:
        ValueError: no such files, a file that is none of token bins, or not one row in them.
    """

    def __init__(self, settings: BinData, seq_length: int) -> None:
        self._files = [mapped(file, settings.dtype) for file in bin_files(settings.path)]
        self._seq_length = seq_length
        self._document_end = settings.document_end
        self._ends = list(accumulate(len(tokens) // seq_length for tokens in self._files))
        if self._ends[-1] == 0:
            raise ValueError(
                f"path {settings.path}: {sum(map(len, self._files))} tokens in {len(self._files)} files, none of which fills a row "
                f"of seq_length {seq_length}."
            )
        self._rows = min(self._ends[-1], settings.limit or self._ends[-1])

    def __len__(self) -> int:
        return self._rows

    def length(self, number: int) -> int:
        """Tokens of a row: all have as many."""
        return self._seq_length

    def documents(self, number: int) -> Sequence[Sample]:
        """The documents in a row."""
        file = bisect_right(self._ends, number)
        start = (number - (self._ends[file - 1] if file else 0)) * self._seq_length
        tokens = self._files[file][start : start + self._seq_length]
        ends = [] if self._document_end is None else (np.flatnonzero(tokens == self._document_end) + 1).tolist()
        edges = [0, *(end for end in ends if end < len(tokens)), len(tokens)]
        return [_document(tokens[start:stop].tolist()) for start, stop in pairwise(edges)]


def bin_files(path: str) -> list[Path]:
    """The files that a path means: itself, those of a folder, or those that fit a pattern.

    Raises:
        ValueError: there are none.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        found = [file for file in given.iterdir() if file.suffix in (".bin", ".npy")]
    else:
        found = [given] if given.is_file() else [Path(name) for name in glob.glob(str(given))]
    if not found:
        raise ValueError(
            f"path {path}: no such file, no folder with .bin or .npy files, and no pattern that fits a file."
        )
    return sorted(found)


def mapped(file: Path, dtype: str) -> Any:
    """The tokens of a file, [tokens] of uint16, uint32 or another integer, not read but mapped.

    Raises:
        ValueError: it holds no tokens.
    """
    if file.suffix == ".npy":
        try:
            tokens = np.load(file, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"path {file}: is no array of numpy ({error}).") from error
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"path {file}: an array of {tokens.dtype}, {tokens.shape}; expected integers in one dimension."
            )
        return tokens
    size = file.stat().st_size
    header = np.fromfile(file, dtype="<i4", count=4) if size >= 4 * HEADER else np.zeros(4, "<i4")
    if int(header[0]) not in (FINEWEB, SIZED):
        width = np.dtype(dtype).itemsize
        if size == 0 or size % width:
            raise ValueError(
                f"path {file}: {size} bytes, which is no number of tokens of {dtype}; expected {width} bytes each."
            )
        return np.memmap(file, dtype=dtype, mode="r")
    return _after_header(file, size, *map(int, header))


def _after_header(file: Path, size: int, magic: int, version: int, tokens: int, width: int) -> Any:
    width = 2 if magic == FINEWEB else width
    if version != VERSION or width not in DTYPES:
        raise ValueError(
            f"path {file}: a header of version {version} and {width} bytes a token; expected {VERSION}, and 2 or 4 bytes."
        )
    if tokens < 1 or size < 4 * HEADER + tokens * width:
        raise ValueError(
            f"path {file}: its header says {tokens} tokens of {width} bytes, but {size - 4 * HEADER} bytes follow; it is cut off."
        )
    return np.memmap(file, dtype=DTYPES[width], mode="r", offset=4 * HEADER, shape=(tokens,))


def _document(tokens: list[int]) -> Sample:
    return Sample(tokens, [IGNORED, *tokens[1:]])
