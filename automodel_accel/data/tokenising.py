"""Rows to samples: text to tokens, the loss on those that begin inside a learned part, each end of a text exactly once."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from automodel_accel.data.chat import Conversations
from automodel_accel.data.counts import BadRow, Counts
from automodel_accel.data.questions import of_documents, of_hellaswag, of_instructions, of_squad
from automodel_accel.data.rendered import Rendered, Renderer, Row
from automodel_accel.data.sample import IGNORED, Sample
from automodel_accel.data.settings import ChatData, HellaSwagData, InstructionData, RowData, SquadData, TextData


class Encoder:
    """Makes samples of the rows of a data set.

    Args:
        settings: Of the data set.
        tokenizer: A fast one of transformers.
        seq_length: The most tokens of a sample.

    Raises:
        ValueError: the tokenizer is a slow one, has no end-of-text token where one is needed, or no chat template where one is.
    """

    def __init__(self, settings: RowData, tokenizer: Any, seq_length: int) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} is no fast tokenizer, which alone says which characters a token stands for; load it by "
                "AutoTokenizer, from a folder with a tokenizer.json."
            )
        self.settings = settings
        self.counts = Counts()
        self.render = renderer(settings, tokenizer)
        self._tokenizer = tokenizer
        self._seq_length = seq_length
        if self.render.with_ends and tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos_token, which ends a text: a model that never sees it never learns to stop. Set "
                "tokenizer.eos_token."
            )

    def __call__(self, rows: Iterable[tuple[int, Row]]) -> list[Sample]:
        """The samples of numbered rows, in their order; the tokenizer is called once for all.

        Raises:
            ValueError: a row cannot be used and the settings are strict, or a sample is too long and that is an error.
        """
        numbered = [(number, rendered) for number, row in rows for rendered in self._rendered(number, row)]
        if not numbered:
            return []
        tokens = self._tokenizer(
            [rendered.text for _, rendered in numbered],
            add_special_tokens=self.render.with_ends,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        encoded = zip(numbered, tokens["input_ids"], tokens["offset_mapping"], strict=True)
        return [
            sample for (number, text), ids, offsets in encoded for sample in self._samples(number, text, ids, offsets)
        ]

    def _rendered(self, number: int, row: Row) -> list[Rendered]:
        self.counts.rows += 1
        try:
            return self.render(row)
        except BadRow as bad:
            self.counts.leave_out(number, bad, self.settings.strict)
            return []

    def _samples(self, number: int, rendered: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> list[Sample]:
        labels = labelled(rendered, ids, offsets)
        if self.render.with_ends:
            ids, labels = with_ends(ids, labels, self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        try:
            cut = self._cut(ids, labels)
        except BadRow as bad:
            self.counts.leave_out(number, bad, self.settings.strict)
            return []
        for sample in cut:
            self.counts.samples += 1
            self.counts.tokens += len(sample.input_ids)
            self.counts.label_tokens += sum(label != IGNORED for label in sample.labels)
        return cut

    def _cut(self, ids: list[int], labels: list[int]) -> list[Sample]:
        """By the policy for samples that are too long."""
        most = self._seq_length
        policy: str = self.settings.too_long  # texts have one more
        is_long = len(ids) > most
        came = f"{len(ids)} tokens, where a row holds {most}"
        if is_long and policy == "error":
            raise ValueError(
                f'a sample has {came}, and too_long is "error"; expected a longer seq_length, or too_long: "truncate" or "drop".'
            )
        if is_long and policy == "drop":
            raise BadRow("longer than a row", came)
        starts = range(0, len(ids), most) if policy == "split" else (0,)
        cut = [_sample(ids[start : start + most], labels[start : start + most]) for start in starts]
        found = [sample for sample in cut if any(label != IGNORED for label in sample.labels)]
        if not found:
            after = "after its end was cut off" if is_long else "at all"
            raise BadRow(f"no token with loss {after}", came if is_long else f"{len(ids)} tokens")
        self.counts.truncated += is_long and policy == "truncate"
        self.counts.split += is_long and policy == "split"
        return found


def renderer(settings: RowData, tokenizer: Any) -> Renderer:
    """What makes text of the rows of a data set."""
    if isinstance(settings, ChatData):
        return Conversations.of(settings, tokenizer)
    if isinstance(settings, InstructionData):
        return of_instructions(settings, tokenizer)
    if isinstance(settings, SquadData):
        return of_squad(settings, tokenizer)
    if isinstance(settings, HellaSwagData):
        return of_hellaswag(settings)
    assert isinstance(settings, TextData)
    return of_documents(settings)


def labelled(rendered: Rendered, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The labels of a text: the token where its first character lies in a learned part, else IGNORED.

    A token that begins before a learned part and ends in it carries no loss: a prompt never ends so. Tokenizers that leave the
    space in front of a word out of its token's characters say of a token that is nothing but spaces that it is empty, and lies
    behind them; of the begin of a text, that it is empty and lies at 0.
    """
    starts = [start for start, _ in rendered.learned]
    labels = []
    for token, (start, stop) in zip(ids, offsets, strict=True):
        first = start if start < stop else stop - 1
        part = bisect_right(starts, first) - 1
        learned = part >= 0 and first < rendered.learned[part][1]
        labels.append(token if learned else IGNORED)
    return labels


def with_ends(ids: list[int], labels: list[int], bos: int | None, eos: int) -> tuple[list[int], list[int]]:
    """The tokens of a text as its tokenizer makes them, beginning with one `bos` at most and ending with exactly one `eos`.

    The end carries loss where the token before it does: so a model learns to stop.
    """
    if bos is not None and ids[:2] == [bos, bos]:
        ids, labels = ids[1:], labels[1:]
    while ids[-1:] == [eos]:
        ids, labels = ids[:-1], labels[:-1]
    learned = bool(labels) and labels[-1] != IGNORED
    return [*ids, eos], [*labels, eos if learned else IGNORED]


def _sample(ids: list[int], labels: list[int]) -> Sample:
    return Sample(ids, [IGNORED, *labels[1:]])
