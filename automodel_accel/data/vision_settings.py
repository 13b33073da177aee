"""What a recipe says of a vision-language data set: one dataclass a kind, told apart by `kind`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

DESCRIBE = "Describe this image."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where the rows are.

    Attributes:
        path: A name on the Hugging Face hub, a JSON, JSONL or Parquet file, or a folder that `datasets` reads.
        split: Of a name or a folder, in the notation of `datasets`, such as "train[:1%]".
        images: The folder that names of images are relative to; None is the folder of the file. For local files.
        limit: At most so many rows, the first ones; None takes all.
        shuffle: Whether rows come in a new order each epoch.
        seed: Of these orders.
        cache_mb: Memory, in MiB of each process that reads, for decoded images of files, which need not be decoded again then.
        strict: Stop at a row that cannot be used; otherwise it is counted, and the next one that can takes its place.
    """

    path: str
    split: str = "train"
    images: Path | None = None
    limit: int | None = None
    shuffle: bool = True
    seed: int = 42
    cache_mb: int = 256
    strict: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: expected a number of rows of at least 1, or null for all of them.")
        if self.cache_mb < 0:
            raise ValueError(f"cache_mb={self.cache_mb}: expected a number of MiB, 0 to keep no image.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CordV2(_Source):
    """Receipts and what stands on them (`naver-clova-ix/cord-v2`): `image`, and `ground_truth` as JSON with `gt_parse`.

    Attributes:
        prompt: What the user asks.
    """

    kind: Literal["cord_v2"] = "cord_v2"
    path: str = "naver-clova-ix/cord-v2"
    prompt: str = DESCRIBE


@dataclass(frozen=True, slots=True, kw_only=True)
class Rdr(_Source):
    """Items and their descriptions (`quintend/rdr-items`): `image` and `text`.

    Attributes:
        prompt: What the user asks.
    """

    kind: Literal["rdr"] = "rdr"
    path: str = "quintend/rdr-items"
    prompt: str = DESCRIBE


@dataclass(frozen=True, slots=True, kw_only=True)
class MedPix(_Source):
    """Questions on medical images (`medpix-dataset/medpix-dataset`): `image_id`, which is the image, `question`, `answer`."""

    kind: Literal["medpix"] = "medpix"
    path: str = "medpix-dataset/medpix-dataset"


@dataclass(frozen=True, slots=True, kw_only=True)
class Llava(_Source):
    """LLaVA's instruction format: `conversations` of {"from": "human" | "gpt", "value"}, with <image> where one of `image` is."""

    kind: Literal["llava"] = "llava"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageChat(_Source):
    """Chats: `messages` of {"role", "content"}, where content is text or a list of text and image parts; and `images`."""

    kind: Literal["image_chat"] = "image_chat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Captions(_Source):
    """Images and what is to be said of each, in columns of any name.

    Attributes:
        image: The column that holds the image.
        text: The column that holds what is to be said.
        prompt: What the user asks.
    """

    kind: Literal["captions"] = "captions"
    image: str = "image"
    text: str = "text"
    prompt: str = DESCRIBE


@dataclass(frozen=True, slots=True, kw_only=True)
class MockImages(_Source):
    """Random pictures and words, the same for the same seed: to measure speed, or to try a recipe without data.

    Attributes:
        path: Of no meaning here.
        prompt: What the user asks.
        samples: How many.
        images_per_sample: Pictures of each.
        side: Pixels of a picture's width and height.
        words: Of an answer.
    """

    kind: Literal["mock_images"] = "mock_images"
    path: str = "mock"
    prompt: str = DESCRIBE
    samples: int = 256
    images_per_sample: int = 1
    side: int = 64
    words: int = 16


VisionSettings: TypeAlias = CordV2 | Rdr | MedPix | Llava | ImageChat | Captions | MockImages
