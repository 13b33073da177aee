"""Images of a row, from a file, from bytes, or decoded already; every one is read whole, so that a broken one shows here."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from automodel_accel.data.vision_chats import BadSample, Chat

# what Pillow raises for files that are no images, cut off, malformed, or larger than it takes for safe
_BROKEN = (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError)


class Decoded:
    """Images of files, decoded once. The first ones stay: an epoch that does not fit would push each out before it comes again.

    Args:
        room: Bytes that their pixels may take; what is over is decoded each time.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._images: dict[Path, Image.Image] = {}

    def open(self, file: Path) -> Image.Image:
        """A copy that is the caller's."""
        kept = self._images.get(file)
        if kept is not None:
            return kept.copy()
        image = open_image(file)
        size = image.width * image.height * len(image.getbands())
        if size <= self._room:
            self._room -= size
            self._images[file] = image.copy()
        return image


def with_open_images(chat: Chat, folder: Path | None, decoded: Decoded) -> Chat:
    """The chat with its images decoded, RGB.

    Args:
        chat: Not changed.
        folder: What names of files are relative to; None where they come from no local file.
        decoded: Those of files that are decoded already; gets those that are decoded now.

    Raises:
        BadSample: an image that is not there or that does not decode.
    """
    return [
        {
            **message,
            "content": [
                _opened(part, folder, decoded) if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in chat
    ]


def check_files(chat: Chat, folder: Path | None) -> None:
    """Raise BadSample for the first image that names a file which does not exist; nothing is decoded."""
    for message in chat:
        for part in message["content"]:
            if part["type"] == "image" and isinstance(part["image"], str | Path):
                _existing(part["image"], folder)


def _opened(part: dict[str, Any], folder: Path | None, decoded: Decoded) -> dict[str, Any]:
    source = part["image"]
    if isinstance(source, str | Path):
        return {**part, "image": decoded.open(_existing(source, folder))}
    return {**part, "image": open_image(source, folder)}


def open_image(source: Any, folder: Path | None = None) -> Image.Image:
    """An image as PIL's, RGB and decoded.

    Args:
        source: A path, bytes, a PIL image, or {"bytes", "path"} as `datasets` has it undecoded.
        folder: What a relative path is relative to.

    Raises:
        BadSample: no such file, or no image.
    """
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, str | Path):
        source = _existing(source, folder)
    elif isinstance(source, bytes):
        source = io.BytesIO(source)
    elif not isinstance(source, Image.Image):
        raise BadSample(f"an image is a {type(source).__name__}; expected a path, bytes or a PIL image")
    try:
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        with Image.open(source) as image:
            return image.convert("RGB")
    except _BROKEN as error:
        name = f"{source} " if isinstance(source, Path) else ""
        raise BadSample(f"the image {name}does not decode: {error}") from error


def _existing(name: str | Path, folder: Path | None) -> Path:
    text = str(name)
    if "://" in text or text.startswith("data:"):
        raise BadSample(f"the image {text[:80]} is no local file; download the images first")
    path = Path(text) if folder is None else folder / text
    if not path.is_file():
        raise BadSample(f"the image {path} does not exist")
    return path
