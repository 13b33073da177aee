"""What the generic collate does not serve, a row a family: a way to call its processor, with the reason.

A row is keyed by the class of the processor and gets (the generic way, the processor, the chats).
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch

from automodel_accel.data.vision_chats import BadSample, Chat

Batch: TypeAlias = dict[str, torch.Tensor]
Family: TypeAlias = Callable[[Callable[[Sequence[Chat]], Batch], Any, Sequence[Chat]], Batch]


def family_of(processor: Any) -> Family:
    """How to make a batch with this processor."""
    return next((_FAMILIES[kind.__name__] for kind in type(processor).__mro__ if kind.__name__ in _FAMILIES), _generic)


def _generic(by_text: Callable[[Sequence[Chat]], Batch], processor: Any, chats: Sequence[Chat]) -> Batch:
    return by_text(chats)


def _paligemma(by_text: Callable[[Sequence[Chat]], Batch], processor: Any, chats: Sequence[Chat]) -> Batch:
    """A prefix that sees all of itself, and a suffix: token_type_ids say which is which, and come with the suffix alone."""
    prompts, images, answers = zip(*(_prompt_and_answer(processor, chat) for chat in chats))
    batch = processor(
        text=list(prompts),
        images=list(images),
        suffix=list(answers),
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    return dict(batch)


def _prompt_and_answer(processor: Any, chat: Chat) -> tuple[str, list[Any], str]:
    if [message["role"] for message in chat[-2:]] != ["user", "assistant"] or len(chat) != 2:
        raise BadSample(f"{len(chat)} turns; this model is trained on one question and its answer")
    parts = chat[0]["content"]
    images = [part["image"] for part in parts if part["type"] == "image"]
    if not images:
        raise BadSample("no image; this model takes none of text alone")
    question, answer = ("".join(part.get("text", "") for part in message["content"]) for message in chat)
    return processor.image_token * len(images) + question, images, answer


_FAMILIES: Mapping[str, Family] = MappingProxyType({"PaliGemmaProcessor": _paligemma})
