"""A vision-language data set for a DataLoader: chats with decoded images, whatever the schema and however broken its files.

    data = VisionData(Llava(path="train.json", images=Path("images")))
    collate = VisionCollate(processor, max_length=2048)
    loader = DataLoader(data.fitting(collate), batch_size=8, shuffle=True, collate_fn=collate)

A row that cannot be used is counted, and the next one that can takes its place, so that every rank makes as many batches.
"""

import logging
from collections.abc import Callable

import torch
from torch.utils.data import Dataset

from automodel_accel.data.vision_chats import BadSample, Chat, chat_of
from automodel_accel.data.vision_images import Decoded, check_files, with_open_images
from automodel_accel.data.vision_settings import VisionSettings
from automodel_accel.data.vision_sources import open_rows

logger = logging.getLogger("automodel_accel")
NAMED = 5  # bad rows that are said with their reason, of each process
_UNKNOWN, _GOOD, _BAD = 0, 1, 2


class VisionData(Dataset[Chat]):
    """Chats by their number.

    The verdicts on rows lie in shared memory: a row that one worker of a DataLoader found bad is bad for all, and counted once.

    Args:
        settings: Which rows.

    Raises:
        ValueError: as `open_rows`; no row can be used; or with `strict`, any row cannot.
    """

    def __init__(self, settings: VisionSettings) -> None:
        self.settings = settings
        self._rows, self._folder = open_rows(settings)
        self._check: Callable[[Chat], object] | None = None
        self._named = 0
        self._decoded = Decoded(settings.cache_mb * 2**20)
        self._verdicts = torch.zeros(len(self._rows), dtype=torch.uint8)
        self._verdicts.share_memory_()  # type: ignore[no-untyped-call]
        if isinstance(self._rows, list):  # in memory already, so that looking at each is cheap
            for number in range(len(self._rows)):
                self._try(number, self._without_pixels)

    @property
    def skipped(self) -> int:
        """Rows found bad so far. Whether an image decodes is known when it is first used, or after `check`."""
        return int((self._verdicts == _BAD).sum())

    def fitting(self, collate: Callable[[list[Chat]], object]) -> "VisionData":
        """The same data, whose rows must also pass `collate.check(chat)`, which raises BadSample: samples too long for it."""
        self._check = getattr(collate, "check", None)
        return self

    def check(self) -> int:
        """Decode every image now; returns how many rows are bad."""
        for number in range(len(self._rows)):
            self._try(number, lambda row: self._whole(row, self._check))
        return self.skipped

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Chat:
        """The chat of a row, or of the next one that is good, with its images decoded, RGB."""
        return self.good(number, self._check)

    def good(self, number: int, check: Callable[[Chat], object] | None) -> Chat:
        """As `data[number]`, of the rows that pass `check`, which raises BadSample.

        Raises:
            ValueError: there is none; or with `strict`, the row is bad.
        """
        for step in range(len(self._rows)):
            chat = self._try((number + step) % len(self._rows), lambda row: self._whole(row, check))
            if chat is not None:
                return chat
        raise ValueError(
            f"{self.settings.path}: none of its {len(self._rows)} rows can be used; the log names the first ones."
        )

    def _try(self, number: int, load: Callable[[int], Chat]) -> Chat | None:
        if self._verdicts[number] == _BAD:
            return None
        try:
            return load(number)
        except BadSample as bad:
            if self.settings.strict:
                raise ValueError(f"{self._place(number)}: {bad} (strict: true).") from bad
            self._verdicts[number] = _BAD
            self._name(number, bad)
            return None

    def _without_pixels(self, number: int) -> Chat:
        chat = chat_of(self.settings, self._rows[number])
        check_files(chat, self._folder)
        return chat

    def _whole(self, number: int, check: Callable[[Chat], object] | None) -> Chat:
        chat = with_open_images(chat_of(self.settings, self._rows[number]), self._folder, self._decoded)
        if check is not None and self._verdicts[number] == _UNKNOWN:
            check(chat)
            self._verdicts[number] = _GOOD
        return chat

    def _name(self, number: int, bad: BadSample) -> None:
        self._named += 1
        if self._named <= NAMED:
            logger.warning("%s is left out: %s", self._place(number), bad)
        if self._named == NAMED:
            logger.warning("%s: further rows that are left out are counted, not named", self.settings.path)

    def _place(self, number: int) -> str:
        return f"{self.settings.path}, row {number}"
