"""Windows: the rows of an epoch cut into parts, each of which is ordered, tokenised and packed by itself.

A window depends on the seed, the epoch and where it begins, and on nothing before it. So a run that stopped in the middle of one
makes it again and goes on behind what was given out: its place in the data is three numbers, whether rows are packed, grouped or
streamed, and whatever the number of ranks.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from automodel_accel.data.packing import first_fit_decreasing
from automodel_accel.data.sample import Sample, Samples
from automodel_accel.data.settings import Batching
from automodel_accel.data.sources import Row, RowStream
from automodel_accel.data.tokenising import Encoder

TOKENS_OF_ROWS = (
    64  # a window holds tokens for as many rows: only the last one of them is left as full as chance has it
)
CHUNK = 128  # rows that are tokenised at once
BATCHES_OF_A_GROUP = 50  # whose samples are sorted by length together, as in transformers' group_by_length

Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True)
class Window:
    """A part of an epoch, arranged.

    Attributes:
        start: Rows of the epoch (samples, where they are at hand) before it.
        source: Where the reading of a stream was at its start; None elsewhere.
        items: Row of tokens -> the numbers of its samples.
        documents: Number of a sample -> its documents.
    """

    start: int
    source: Any
    items: Sequence[Sequence[int]]
    documents: Callable[[int], Sequence[Sample]]


class Corpus(Protocol):
    """Data that windows are made of."""

    @property
    def size(self) -> int | None:
        """Samples an epoch; None where only reading tells."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the same place means the same samples for, in JSON types."""

    def windows(self, epoch: int, start: int = 0, source: Any = None) -> Iterator[Window]:
        """The windows of an epoch from `start` on, where one begins."""


@dataclass(frozen=True, slots=True)
class AtHand:
    """Samples that can be reached by their number: each epoch has an order of its own."""

    samples: Samples
    batching: Batching
    shuffle: bool
    seed: int

    @property
    def size(self) -> int:
        """Samples an epoch."""
        return len(self.samples)

    @property
    def identity(self) -> dict[str, Any]:
        """Its order, how many samples it has, and their tokens."""
        tokens = sum(map(self.samples.length, range(len(self.samples))))
        return {"shuffle": self.shuffle, "seed": self.seed, "samples": len(self.samples), "tokens": tokens}

    def windows(self, epoch: int, start: int = 0, source: Any = None) -> Iterator[Window]:
        """The windows of an epoch from sample `start` of its order on."""
        order: Sequence[int] = range(len(self.samples))
        if self.shuffle:
            order = shuffled(order, self.seed, epoch)
        while start < len(order):
            stop, tokens = start, 0
            while stop < len(order) and not is_full(stop - start, tokens, self.batching):
                tokens += self.samples.length(order[stop])
                stop += 1
            numbers = order[start:stop]
            rows = arranged([self.samples.length(number) for number in numbers], self.batching)
            if self.shuffle and self.batching.packing:
                rows = shuffled(rows, self.seed, epoch, start)
            yield Window(start, None, [[numbers[index] for index in row] for row in rows], self.samples.documents)
            start = stop


@dataclass(frozen=True, slots=True)
class Streamed:
    """Rows that are read and tokenised while training, a window at a time; each window has an order of its own."""

    rows: RowStream
    encode: Encoder
    batching: Batching
    shuffle: bool
    seed: int

    @property
    def size(self) -> None:
        """Unknown before they are read."""
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """Its order."""
        return {"shuffle": self.shuffle, "seed": self.seed}

    def windows(self, epoch: int, start: int = 0, source: Any = None) -> Iterator[Window]:
        """The windows of an epoch from row `start` of the source on, where its reading was at `source`.

        Raises:
            ValueError: a whole epoch gave no sample.
        """
        reading = self.rows.read(source)
        is_whole, before = start == 0, self.encode.counts.samples
        read = -1
        while read:
            samples, read = self._next(reading, start)
            if samples:
                yield Window(start, source, self._items(samples, epoch, start), _documents_of(samples))
            start, source = start + read, self.rows.position()
        if is_whole and self.encode.counts.samples == before:
            raise nothing_left(self.encode)

    def _next(self, reading: Iterator[Row], start: int) -> tuple[list[Sample], int]:
        """The samples of the next window, and the number of rows that they are made of."""
        samples: list[Sample] = []
        read = tokens = 0
        while not is_full(read, tokens, self.batching):
            chunk = list(islice(reading, CHUNK))
            if not chunk:
                break
            made = self.encode(enumerate(chunk, start + read))
            samples += made
            tokens += sum(len(sample.input_ids) for sample in made)
            read += len(chunk)
        return samples, read

    def _items(self, samples: list[Sample], epoch: int, start: int) -> Sequence[Sequence[int]]:
        numbers: Sequence[int] = range(len(samples))
        if self.shuffle:
            numbers = shuffled(numbers, self.seed, epoch, start)
        rows = arranged([len(samples[number].input_ids) for number in numbers], self.batching)
        if self.shuffle and self.batching.packing:
            rows = shuffled(rows, self.seed, epoch, start)
        return [[numbers[index] for index in row] for row in rows]


def shuffled(things: Sequence[Thing], *seeds: int) -> list[Thing]:
    """The things in an order that depends on their number and the seeds alone."""
    order = list(things)
    random.Random(" ".join(map(str, seeds))).shuffle(order)  # of a text, every character counts
    return order


def is_full(rows: int, tokens: int, batching: Batching) -> bool:
    """Whether a window of so many rows and tokens ends."""
    return rows >= batching.window and tokens >= TOKENS_OF_ROWS * batching.seq_length


def arranged(lengths: Sequence[int], batching: Batching) -> list[list[int]]:
    """Which samples of a window share a row: their indices, one list a row."""
    if batching.packing:
        return first_fit_decreasing(lengths, batching.seq_length)
    order = list(range(len(lengths)))
    if batching.group_by_length:
        group = BATCHES_OF_A_GROUP * batching.batch_size
        order.sort(key=lambda index: (index // group, -lengths[index]))
    return [[index] for index in order]


def nothing_left(encode: Encoder) -> ValueError:
    """The error of data of which no row can be used."""
    return ValueError("\n".join([f"the data set {encode.settings.path} gave no sample:", *encode.counts.lines()]))


def _documents_of(samples: list[Sample]) -> Callable[[int], Sequence[Sample]]:
    return lambda number: samples[number : number + 1]
