"""Rows in the schema of their data set, as chats: one function a kind.

A chat is a list of {"role", "content"} in the order of speaking; content is a list of {"type": "text", "text"} and
{"type": "image", "image"}, where the image is what the row gave: a path, bytes, or a PIL image.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from automodel_accel.data.vision_settings import (
    Captions,
    CordV2,
    ImageChat,
    Llava,
    MedPix,
    MockImages,
    Rdr,
    VisionSettings,
)

Part = dict[str, Any]
Chat = list[dict[str, Any]]

MARKER = "<image>"
MOCK_WORDS = (
    "the",
    "image",
    "shows",
    "a",
    "river",
    "under",
    "blue",
    "sky",
    "with",
    "birds",
    "and",
    "trees",
    "in",
    "wind",
)
_ROLES = MappingProxyType(
    {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
)


class BadSample(ValueError):
    """A row that cannot be trained on; says why."""


def chat_of(settings: VisionSettings, row: Mapping[str, Any]) -> Chat:
    """A row as a chat that begins with somebody else than the assistant and ends with the assistant's text.

    Raises:
        BadSample: a column is missing or of another kind, or images and their places do not match.
    """
    chat = _KINDS[type(settings)](settings, row)
    roles = [message["role"] for message in chat]
    if not roles or roles[0] == "assistant" or roles[-1] != "assistant":
        raise BadSample(f"the roles are {', '.join(roles) or 'none'}; expected a user first and the assistant last")
    for message in chat:
        if message["role"] == "assistant" and any(part["type"] != "text" for part in message["content"]):
            raise BadSample("the assistant shows an image; only its text can be learned")
    return chat


def _cord_v2(settings: Any, row: Mapping[str, Any]) -> Chat:
    try:
        truth = json.loads(_column(row, "ground_truth", str))
    except json.JSONDecodeError as error:
        raise BadSample(f"ground_truth is not JSON: {error.msg}, character {error.pos}") from error
    parses = truth.get("gt_parses") or [truth.get("gt_parse")] if isinstance(truth, dict) else [None]
    if not isinstance(parses[0], dict):
        raise BadSample("ground_truth has no gt_parse, a mapping")
    return _question(_column(row, "image"), settings.prompt, as_tokens(parses[0]))


def _rdr(settings: Any, row: Mapping[str, Any]) -> Chat:
    return _question(_column(row, "image"), settings.prompt, _column(row, "text", str))


def _medpix(settings: Any, row: Mapping[str, Any]) -> Chat:
    return _question(_column(row, "image_id"), _column(row, "question", str), _column(row, "answer", str))


def _llava(settings: Any, row: Mapping[str, Any]) -> Chat:
    turns = _column(row, "conversations", list)
    said = [(turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None) for turn in turns]
    return _with_images(said, _images(row))


def _image_chat(settings: Any, row: Mapping[str, Any]) -> Chat:
    turns = _column(row, "messages", list)
    said = [(turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None) for turn in turns]
    return _with_images(said, _images(row))


def _captions(settings: Any, row: Mapping[str, Any]) -> Chat:
    return _question(_column(row, settings.image), settings.prompt, _column(row, settings.text, str))


def _mock(settings: Any, row: Mapping[str, Any]) -> Chat:
    numbers = np.random.default_rng((settings.seed, row["number"]))
    size = (settings.side, settings.side, 3)
    shown = [
        {"type": "image", "image": Image.fromarray(numbers.integers(256, size=size, dtype=np.uint8))}
        for _ in range(settings.images_per_sample)
    ]
    said = " ".join(MOCK_WORDS[number] for number in numbers.integers(len(MOCK_WORDS), size=settings.words))
    return [
        {"role": "user", "content": [*shown, {"type": "text", "text": settings.prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": said}]},
    ]


_KINDS: Mapping[type, Callable[[Any, Mapping[str, Any]], Chat]] = MappingProxyType(
    {
        CordV2: _cord_v2,
        Rdr: _rdr,
        MedPix: _medpix,
        Llava: _llava,
        ImageChat: _image_chat,
        Captions: _captions,
        MockImages: _mock,
    }
)


def as_tokens(value: Any) -> str:
    """A parse as text: <s_key>...</s_key> around a field, keys in reverse order, <sep/> between the items of a list.

    Source: Donut's json2token (Kim et al., OCR-free Document Understanding Transformer, 2022), in which CORD-v2 is learned.
    """
    if isinstance(value, dict):
        if value.keys() == {"text_sequence"}:
            return str(value["text_sequence"])
        return "".join(f"<s_{key}>{as_tokens(value[key])}</s_{key}>" for key in sorted(value, reverse=True))
    return "<sep/>".join(map(as_tokens, value)) if isinstance(value, list) else str(value)


def _question(image: Any, question: str, answer: str) -> Chat:
    shown = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": shown}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def _column(row: Mapping[str, Any], name: str, kind: type | None = None) -> Any:
    value = row.get(name)
    if value is None:
        raise BadSample(f"no {name!r}; its columns are {', '.join(map(repr, row)) or 'none'}")
    if kind is not None and not isinstance(value, kind):
        raise BadSample(f"{name!r} is a {type(value).__name__}, expected a {kind.__name__}")
    return value


def _images(row: Mapping[str, Any]) -> list[Any]:
    if row.get("video") or row.get("videos"):
        raise BadSample("it has a video; only images are read")
    found = row.get("images") or row.get("image") or []
    return list(found) if isinstance(found, list | tuple) else [found]


def _with_images(said: list[tuple[Any, Any]], images: list[Any]) -> Chat:
    """Turns of (role, content), with the images of the row where the content marks them, or else at the beginning."""
    waiting = iter(images)
    chat = [_message(role, content, waiting, marked=bool(images)) for role, content in said]
    left = [{"type": "image", "image": image} for image in waiting]
    placed = sum(part["type"] == "image" for message in chat for part in message["content"])
    user = next((message for message in chat if message["role"] == "user"), None)
    if left and (placed or user is None):
        raise BadSample(f"{len(images)} images, and places for {len(images) - len(left)} of them")
    if left and user is not None:
        user["content"] = left + user["content"]
    return chat


def _message(role: Any, content: Any, waiting: Iterator[Any], marked: bool) -> dict[str, Any]:
    if role not in _ROLES:
        raise BadSample(f"a turn of {role!r}; expected one of {', '.join(_ROLES)}")
    if isinstance(content, str):
        parts = list(_split(content, waiting)) if marked and _ROLES[role] == "user" else [_text(content)]
    elif isinstance(content, list):
        parts = [_part(part, waiting) for part in content]
    else:
        raise BadSample(f"the content of a turn is a {type(content).__name__}, expected text or a list of parts")
    return {"role": _ROLES[role], "content": parts}


def _split(content: str, waiting: Iterator[Any]) -> Iterator[Part]:
    """Text and images in turn; line breaks beside a marker are those of the format and belong to no text."""
    first, *rest = re.split(rf"\n?{re.escape(MARKER)}\n?", content)
    if first:
        yield _text(first)
    for text in rest:
        yield _next_image(waiting)
        if text:
            yield _text(text)


def _part(part: Any, waiting: Iterator[Any]) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _text(part["text"])
    if kind == "image":
        own = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        return _next_image(waiting) if own is None else {"type": "image", "image": own}
    raise BadSample(
        f'a part {json.dumps(part, default=str)[:80]}; expected {{"type": "text", "text"}} or {{"type": "image"}}'
    )


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _next_image(waiting: Iterator[Any]) -> Part:
    image = next(waiting, None)
    if image is None:
        raise BadSample("a place for an image, and no image left for it")
    return {"type": "image", "image": image}
