"""VisionLoader: the batches of one rank of chats with images, in an order that depends on the seed alone, from any place on."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from automodel_accel.data.ahead import made_ahead
from automodel_accel.data.batches import Batch
from automodel_accel.data.counts import Counts
from automodel_accel.data.loader import Filled, Place, State, check_ranks
from automodel_accel.data.sample import IGNORED
from automodel_accel.data.settings import Batching
from automodel_accel.data.vision import VisionData
from automodel_accel.data.vision_chats import BadSample
from automodel_accel.data.vision_collate import VisionCollate
from automodel_accel.data.vision_settings import VisionSettings
from automodel_accel.data.windows import shuffled


def open_vision_data(
    settings: VisionSettings,
    processor: Any,
    batching: Batching,
    *,
    data_rank: int = 0,
    data_size: int = 1,
    epochs: int | None = 1,
) -> "VisionLoader":
    """The batches of a data set with images, for one rank.

    Args:
        settings: Which data.
        processor: transformers' processor of the model.
        batching: `batch_size`, `prefetch` and `seq_length`, the most tokens of a sample, those of its images included. Rows hold
            one sample each: images are not packed.
        data_rank: Which of the ranks that see rows of their own this is.
        data_size: How many there are.
        epochs: How often to go through the data; None for without end.

    Raises:
        ValueError: the data cannot be read, or no row of it can be used.
    """
    data = VisionData(settings)
    collate = VisionCollate(processor, max_length=batching.seq_length)
    return VisionLoader(data, collate, batching, data_rank=data_rank, data_size=data_size, epochs=epochs)


class VisionLoader:
    """As `Loader`: all ranks go through the same order, of each `data_size * batch_size` rows rank r takes the r-th `batch_size`, and
    an epoch goes over into the next one in the middle of a batch. After the last one the batch is filled up with rows without
    labels. A thread decodes images and makes batches ahead.

    Args:
        data: The chats.
        collate: What makes batches of them.
        batching: How many, and how many ahead.
        data_rank: Which of the ranks that see rows of their own this is.
        data_size: How many there are.
        epochs: How often to go through the data; None for without end.

    Raises:
        ValueError: no such rank.
    """

    def __init__(
        self,
        data: VisionData,
        collate: VisionCollate,
        batching: Batching,
        *,
        data_rank: int = 0,
        data_size: int = 1,
        epochs: int | None = 1,
    ) -> None:
        check_ranks(data_rank, data_size, epochs)
        self.data, self.batching, self.epochs = data, batching, epochs
        self.counts, self.filled = Counts(), Filled()
        self._collate, self._rank, self._size = collate, data_rank, data_size
        self._place, self._ended = Place(), False
        self._identity = {"rows": len(data), "shuffle": data.settings.shuffle, "seed": data.settings.seed}

    @property
    def epoch(self) -> int:
        """The epoch, from 0 on, of the last row that was given out."""
        return self._place.epoch

    def __len__(self) -> int:
        """Batches of all epochs from the beginning, on each rank.

        Raises:
            TypeError: there is no end.
        """
        if self.epochs is None:
            raise TypeError("the number of batches is unknown: the data has no end (epochs is None).")
        return -(-self.epochs * len(self.data) // (self._size * self.batching.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present place on; where all were given out, from the beginning."""
        if self._ended:
            self._place, self._ended = Place(), False
        batches = made_ahead(self._batches(self._place), self.batching.prefetch)
        try:
            for batch, place in batches:
                self._place = place
                self._count(batch)
                yield batch
        finally:
            batches.close()
        self._ended = True

    def state_dict(self) -> State:
        """The place behind the last batch that was given out, in JSON types; the same on all ranks."""
        return {"place": {"epoch": self._place.epoch, "item": self._place.item}, "of": dict(self._identity)}

    def load_state_dict(self, state: State) -> None:
        """Go to a place, whatever the number of ranks that it was saved by.

        Raises:
            ValueError: the data was another.
        """
        if state["of"] != self._identity:
            raise ValueError(
                f"the data of the checkpoint was {state['of']} and is {self._identity}; set it back to go on where it was, or start "
                "over on the data."
            )
        self._place, self._ended = Place(**state["place"]), False

    def _count(self, batch: Batch) -> None:
        is_label = batch["labels"] != IGNORED
        is_sample = is_label.any(1)  # those that fill up the last batch are none
        self.filled.rows += len(is_label)
        self.filled.documents += int(is_sample.sum())
        self.filled.tokens += int(batch["attention_mask"][is_sample].sum())
        self.filled.slots += is_label.numel()
        self.filled.label_tokens += int(is_label.sum())

    def _rows(self, place: Place) -> Iterator[tuple[int, Place]]:
        """(row, the place behind it) of all ranks' rows together."""
        settings = self.data.settings
        while self.epochs is None or place.epoch < self.epochs:
            order = range(len(self.data))
            numbers = shuffled(order, settings.seed, place.epoch) if settings.shuffle else order
            for item in range(place.item, len(numbers)):
                yield numbers[item], Place(place.epoch, item=item + 1)
            place = replace(place, epoch=place.epoch + 1, item=0)

    def _batches(self, place: Place) -> Iterator[tuple[Batch, Place]]:
        size = self.batching.batch_size
        mine: list[int] = []
        number, behind = 0, place
        for row, behind in self._rows(place):
            if number // size == self._rank:
                mine.append(row)
            number += 1
            if number == size * self._size:
                yield self._batch(mine), behind
                mine, number = [], 0
        if number:
            yield self._batch(mine), behind

    def _batch(self, numbers: list[int]) -> Batch:
        """Rows by their numbers; filled up with the first row, of which nothing is learned."""
        count = len(numbers)
        numbers = [*numbers, *[0] * (self.batching.batch_size - count)]
        try:
            batch: Batch = self._collate([self.data[number] for number in numbers])
        except BadSample:  # which one shows when each is looked at by itself, which costs as much again
            batch = self._collate([self.data.good(number, self._collate.check) for number in numbers])
        batch["labels"][count:] = IGNORED
        return batch
