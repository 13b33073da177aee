"""Batches of chats with images, made by the model's own processor, with the loss on what the assistant says.

What an image becomes, which tokens stand for it and which inputs go beside the pixels is all the processor's. The one thing
that it does not say, where the answers are, is read off the text that it hands to its tokenizer.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch

from automodel_accel.data.vision_answers import Rendered, find_answers, render
from automodel_accel.data.vision_chats import BadSample, Chat
from automodel_accel.data.vision_families import family_of

IGNORED = -100  # the label that the loss leaves out


class VisionCollate:
    """Chats, each with its images decoded, as one batch: all that the processor returns, and `labels`.

    Args:
        processor: transformers' processor of the model, with a fast tokenizer. It is not changed.
        max_length: Tokens that a sample may have, those of its images included; None for any number.
        too_long: What `check` and the collate do with a longer one: "drop" refuses that sample, "error" stops. It is never cut:
            the model would get fewer image tokens than images.
        chat_template: Instead of the processor's own.

    Raises:
        ValueError: the processor has no fast tokenizer.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        too_long: Literal["drop", "error"] = "drop",
        chat_template: str | None = None,
    ) -> None:
        tokenizer = getattr(processor, "tokenizer", None)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(processor).__name__} has no fast tokenizer, which is needed to tell the tokens of an answer apart."
            )
        self.processor = processor
        self.max_length = max_length
        self.too_long = too_long
        self.chat_template = chat_template
        self._family = family_of(processor)

    def check(self, chat: Chat) -> None:
        """Raise BadSample for a sample that is longer than `max_length`, or ValueError where that is an error.

        It costs one run of the processor, and nothing without a limit.
        """
        if self.max_length is None:
            return
        tokens = int(self([chat], checked=True)["attention_mask"].sum())
        if tokens > self.max_length:
            self._refuse(tokens)

    def __call__(self, chats: Sequence[Chat], checked: bool = False) -> dict[str, torch.Tensor]:
        """A batch, padded on the right to its longest sample.

        Args:
            chats: At least one. Samples without images may stand beside those with.
            checked: Whether the lengths need not be looked at.

        Returns:
            What the processor returns, and labels [batch, tokens], int64: the tokens of the answers, IGNORED elsewhere.

        Raises:
            BadSample: a sample is too long, or its answers are not found; `VisionData.fitting` keeps such samples out.
            ValueError: what the processor raises, or it alters the tokens so that the answers are not known.
        """
        batch = self._family(self._by_text, self.processor, chats)
        lengths = batch["attention_mask"].sum(1)
        if self.max_length is not None and not checked and int(lengths.max()) > self.max_length:
            self._refuse(int(lengths.max()))
        return batch

    def _refuse(self, tokens: int) -> None:
        said = f"a sample has {tokens} tokens, max_length is {self.max_length}"
        if self.too_long == "error":
            raise ValueError(
                f"{said}; raise max_length, shrink the images by the processor's settings, or set too_long: drop."
            )
        raise BadSample(said)

    def _by_text(self, chats: Sequence[Chat]) -> dict[str, torch.Tensor]:
        rendered = [render(self.processor, chat, self.chat_template) for chat in chats]
        return labelled(self.processor, rendered, [images_of(chat) for chat in chats])


def images_of(chat: Chat) -> list[Any]:
    """The images of a chat, in order."""
    return [part["image"] for message in chat for part in message["content"] if part["type"] == "image"]


def labelled(processor: Any, rendered: Sequence[Rendered], images: Sequence[list[Any]]) -> dict[str, torch.Tensor]:
    """Run the processor over the texts and their images, and label the tokens that overlap an answer."""
    copied, heard = _listening(processor)
    begin = processor.tokenizer.bos_token
    is_begun = begin is not None and rendered[0].text.startswith(begin)  # the tokenizer would begin it once more
    batch = copied(
        text=[one.text for one in rendered],
        images=[list(each) for each in images] if any(images) else None,
        padding=True,
        padding_side="right",
        return_tensors="pt",
        **({"add_special_tokens": False} if is_begun else {}),
    )
    input_ids, encodings = batch["input_ids"], heard.encodings
    # some put the tokens of an image in front of those of the text
    before = input_ids.shape[1] - max((len(one.ids) for one in encodings), default=0)
    if [one.ids for one in encodings] != input_ids[:, before:].tolist():
        name = type(processor).__name__
        raise ValueError(f"{name} changes the tokens after its tokenizer made them, so that answers are not found.")
    labels = torch.full_like(input_ids, IGNORED)
    for row, (one, text, encoding) in enumerate(zip(rendered, heard.texts, encodings)):
        answers = find_answers(one, text)
        is_answer = torch.tensor([False] * before + [_overlaps(offsets, answers) for offsets in encoding.offsets])
        labels[row, is_answer] = input_ids[row, is_answer]
    return {**batch, "labels": labels}


class _Heard:
    """The texts that a tokenizer was last given together, and what it made of them."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.encodings: list[Any] = []


def _listening(processor: Any) -> tuple[Any, _Heard]:
    """A copy of the processor whose tokenizer notes the texts that it is called with; the given one is left as it is."""
    heard = _Heard()
    kind: Any = type(processor.tokenizer)

    def call(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        made = kind.__call__(self, text, *args, **kwargs)
        if isinstance(text, list):  # one text alone is that of an image, which some tokenise by itself
            heard.texts, heard.encodings = text, list(made.encodings or ())
        return made

    copied = copy.copy(processor)
    copied.tokenizer = copy.copy(processor.tokenizer)
    copied.tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return copied, heard


def _overlaps(offsets: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    return any(offsets[0] < stop and offsets[1] > start for start, stop in spans)
