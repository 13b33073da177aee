"""Loader: the batches of one rank, in an order that depends on the seed alone, from any place on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from automodel_accel.data.ahead import made_ahead
from automodel_accel.data.batches import Batch, Documents, batched
from automodel_accel.data.counts import Counts
from automodel_accel.data.sample import IGNORED
from automodel_accel.data.settings import Batching
from automodel_accel.data.windows import Corpus, Window

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the data, the same for all ranks.

    Attributes:
        epoch: Epochs before it.
        start: Where the window begins: rows of the epoch before it.
        item: Rows of tokens of that window before it, of all ranks together.
        source: Where the reading of a stream was at the window's start.
    """

    epoch: int = 0
    start: int = 0
    item: int = 0
    source: Any = None


@dataclass(slots=True)
class Filled:
    """How full the batches of this rank were, since this process began.

    Attributes:
        rows: Rows of tokens.
        documents: Samples in them.
        tokens: Their tokens.
        slots: Tokens that the rows had room for.
        label_tokens: Tokens that carry loss.
    """

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    slots: int = 0
    label_tokens: int = 0

    @property
    def fill(self) -> float:
        """The share of tokens that is no padding."""
        return self.tokens / max(self.slots, 1)

    def add(self, batch: Batch, rows: Sequence[Documents]) -> None:
        """Count a batch and the documents of its rows."""
        labels = batch["labels"]
        self.rows += len(rows)
        self.documents += sum(map(len, rows))
        self.tokens += sum(len(document.input_ids) for row in rows for document in row)
        self.slots += labels.numel()
        self.label_tokens += int((labels != IGNORED).sum())

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents in {self.rows:,} rows, {self.documents / max(self.rows, 1):.1f} a row; "
            f"{self.fill:.1%} of {self.slots:,} tokens are no padding"
        )


def check_ranks(data_rank: int, data_size: int, epochs: int | None) -> None:
    """Raise ValueError where there is no such rank, or no epoch."""
    if not 0 <= data_rank < data_size:
        raise ValueError(f"data_rank is {data_rank} of {data_size}; expected 0 to {data_size - 1}.")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs is {epochs}, expected at least 1, or None for without end.")


class Loader:
    """The batches of one rank.

    All ranks go through the same rows of tokens, in the same order: of each `data_size * batch_size` of them, rank r takes the
    r-th `batch_size`. An epoch goes over into the next one in the middle of a batch. After the last one the batch is filled up
    with rows without labels, so every rank gets as many batches.

    Each rank reads and tokenises all rows, so that the order does not depend on the number of ranks: a run goes on with another
    number, or another batch size, exactly behind the last row that was given out.

    Args:
        corpus: What the rows are made of.
        batching: How.
        pad_token_id: What fills a row.
        data_rank: Which of the ranks that see rows of their own this is.
        data_size: How many there are.
        epochs: How often to go through the data; None for without end.
        counts: What became of the rows, to be told.

    Raises:
        ValueError: no such rank.
    """

    def __init__(
        self,
        corpus: Corpus,
        batching: Batching,
        pad_token_id: int,
        *,
        data_rank: int = 0,
        data_size: int = 1,
        epochs: int | None = 1,
        counts: Counts | None = None,
    ) -> None:
        check_ranks(data_rank, data_size, epochs)
        self.corpus = corpus
        self.batching = batching
        self.counts = counts or Counts()
        self.filled = Filled()
        self.epochs = epochs
        self._pad_token_id = pad_token_id
        self._rank, self._size = data_rank, data_size
        self._place, self._ended = Place(), False
        self._identity = {
            **{name: getattr(batching, name) for name in ("seq_length", "packing", "group_by_length", "window")},
            **({"batch_size": batching.batch_size} if batching.group_by_length else {}),
            **corpus.identity,
        }

    @property
    def epoch(self) -> int:
        """The epoch, from 0 on, of the last row that was given out."""
        return self._place.epoch

    def __len__(self) -> int:
        """Batches of all epochs from the beginning, on each rank.

        Raises:
            TypeError: there is no end, or where it is shows only when the rows are read.
        """
        if self.epochs is None or self.corpus.size is None:
            raise TypeError("the number of batches is unknown: the data streams, or has no end (epochs is None).")
        rows = sum(len(window.items) for epoch in range(self.epochs) for window in self.corpus.windows(epoch))
        return -(-rows // (self._size * self.batching.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present place on; where all were given out, from the beginning."""
        if self._ended:
            self.reset()
        batches = made_ahead(self._batches(self._place), self.batching.prefetch)
        try:
            for batch, rows, place in batches:
                self._place = place
                self.filled.add(batch, rows)
                yield batch
        finally:
            batches.close()
        self._ended = True

    def reset(self) -> None:
        """Go back to the beginning."""
        self._place, self._ended = Place(), False

    def state_dict(self) -> State:
        """The place behind the last batch that was given out, in JSON types; the same on all ranks."""
        place = self._place
        at = {"epoch": place.epoch, "start": place.start, "item": place.item, "source": place.source}
        return {"place": at, "of": dict(self._identity)}

    def load_state_dict(self, state: State) -> None:
        """Go to a place, whatever the number of ranks that it was saved by.

        Raises:
            ValueError: the data was another, or was put into rows in another way: the same place would mean other samples.
        """
        before = state["of"]
        changed = [
            f"{name} was {before.get(name)!r} and is {self._identity.get(name)!r}"
            for name in sorted({*before, *self._identity})
            if before.get(name) != self._identity.get(name)
        ]
        if changed:
            raise ValueError(
                f"the data of the checkpoint was put into rows in another way: {'; '.join(changed)}. Set these back to go on where it "
                "was, or start over on the data."
            )
        self._place, self._ended = Place(**state["place"]), False

    def _rows(self, place: Place) -> Iterator[tuple[Window, Sequence[int], Place]]:
        """(window, row, the place behind it) of every row of tokens, all ranks' rows together."""
        while self.epochs is None or place.epoch < self.epochs:
            first = place.item  # only the first window was begun before
            for window in self.corpus.windows(place.epoch, place.start, place.source):
                for item in range(first, len(window.items)):
                    yield window, window.items[item], Place(place.epoch, window.start, item + 1, window.source)
                first = 0
            place = Place(place.epoch + 1)

    def _batches(self, place: Place) -> Iterator[tuple[Batch, list[Documents], Place]]:
        """(batch, the documents of its rows, the place behind it)."""
        size = self.batching.batch_size
        mine: list[Documents] = []
        number, behind = 0, place
        for window, numbers, behind in self._rows(place):
            if number // size == self._rank:
                mine.append([document for sample in numbers for document in window.documents(sample)])
            number += 1
            if number == size * self._size:
                yield batched(mine, self.batching, self._pad_token_id), mine, behind
                mine, number = [], 0
        if number:
            mine += [[]] * (size - len(mine))
            yield batched(mine, self.batching, self._pad_token_id), mine, behind
