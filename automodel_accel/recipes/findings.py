"""What a run would miss on this machine: files, packages, a tokenizer. Found without reading data or weights."""

import glob
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from automodel_accel.data.settings import BinData, MockData
from automodel_accel.data.sources import PACKED, READERS
from automodel_accel.demo import is_demo, resolve
from automodel_accel.kernels.facts import Facts
from automodel_accel.recipes.loading import load_tokenizer
from automodel_accel.recipes.recipe import Recipe, TextSource, VisionSource

Source = TextSource | VisionSource
# attn_implementation -> the package that brings it
ATTENTION = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}
LONGEST = 160  # characters of what another library says
_IMAGES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that would stop the run, or that it would stumble over.

    Attributes:
        where: The key of the recipe.
        said: What came, what was expected, what to do.
        kind: "error" stops the run; "missing" would, though a trial does without; "note" does not.
    """

    where: str
    said: str
    kind: Literal["error", "missing", "note"] = "error"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a data set is.

    Attributes:
        said: In words.
        is_here: Whether it is on this machine; None where nobody looked: it is on the hub.
        missing: What is missing and what to do, where it is not.
    """

    said: str
    is_here: bool | None
    missing: str = ""


def place_of(source: Source) -> Place:
    """Where the rows of a data set are; nothing is read."""
    if isinstance(source, MockData):
        return Place(f"{source.samples:,} samples of random tokens", True)
    path = source.path
    if is_demo(path):
        try:
            resolve(path)
        except ValueError as error:
            return Place(f"{path}, which cannot be made", False, str(error))
        return Place(f"{path}, made of an installed package", True)
    local = Path(path).expanduser()
    if local.exists() or (isinstance(source, BinData) and glob.glob(str(local))):
        return Place(path, True)
    if isinstance(source, BinData) or _means_a_path(path):
        near = local.absolute().parent
        while not near.exists():
            near = near.parent
        return Place(f"{path}, which does not exist", False, f"{path} does not exist; {near} does")
    return Place(f"{path} on the hub, split {source.split}", None)


def problems_of_data(recipe: Recipe, facts: Facts) -> Iterator[Problem]:
    """Files that are not there, and what reads them."""
    for name, source in _sources(recipe):
        place = place_of(source)
        if place.is_here is False:
            yield Problem(f"{name}.path", place.missing)
        if not isinstance(source, MockData | BinData) and not facts.has("datasets"):
            yield Problem(f"{name}.path", "is read by datasets, which is not installed: pip install datasets")
            return
    streams = getattr(recipe.data, "streaming", False)
    if streams and recipe.training.steps is None:
        yield Problem(
            "training.steps", "is not given, and the data streams, so nobody knows how many there are; give it"
        )


def problems_of_packages(recipe: Recipe, facts: Facts) -> Iterator[Problem]:
    """Packages that the recipe needs and this machine lacks."""
    wanted: list[tuple[str, str, str, str]] = [
        ("logging.trackers", tracker, tracker, tracker) for tracker in recipe.logging.trackers
    ]
    if recipe.optimizer.kind == "adamw8bit":
        wanted.append(("optimizer.kind", "adamw8bit", "bitsandbytes", "'automodel-accel[bnb]'"))
    if recipe.model.quantize is not None:
        wanted.append(("model.quantize", recipe.model.quantize, "bitsandbytes", "'automodel-accel[bnb]'"))
    attention = recipe.model.attn_implementation
    if attention in ATTENTION:
        wanted.append(("model.attn_implementation", attention, ATTENTION[attention], ATTENTION[attention]))
    if recipe.has_images:
        wanted.append(("data", "data with images", "Pillow", "'automodel-accel[vision]'"))
    for where, name, package, to_install in wanted:
        if not (_has_pillow() if package == "Pillow" else facts.has(package)):
            needs = "" if name == package else f"{name} needs "
            yield Problem(where, f"{needs}{package}, which is not installed: pip install {to_install}")


def problems_of_tokenizer(recipe: Recipe) -> Iterator[Problem]:
    """Whether the tokenizer, or for images the processor, can be had."""
    try:
        load_tokenizer(recipe)
    except ValueError as error:
        where, _, said = str(error).partition(": ")
        yield Problem(where.split(" ")[0], textwrap.shorten(said or str(error), LONGEST, placeholder=" ..."))


def problems_of_shape(recipe: Recipe, config: Any) -> Iterator[Problem]:
    """Rows that the model was not made for."""
    text = config.get_text_config()
    most, length = getattr(text, "max_position_embeddings", None), recipe.batching.seq_length
    if isinstance(most, int) and length > most:
        yield Problem(
            "batching.seq_length",
            f"is {length:,}, but the model was made for {most:,} positions; expected no more",
            kind="note",
        )
    vocabulary = getattr(text, "vocab_size", None)
    for name, source in _sources(recipe):
        if isinstance(source, MockData) and isinstance(vocabulary, int) and source.vocab_size > vocabulary:
            yield Problem(
                f"{name}.vocab_size", f"is {source.vocab_size:,}, but the model has {vocabulary:,} words; lower it"
            )


def _sources(recipe: Recipe) -> list[tuple[str, Source]]:
    return [("data", recipe.data), *((f"validation.{name}", one) for name, one in recipe.held_out.items())]


def _means_a_path(path: str) -> bool:
    ends = (*READERS, *_IMAGES, *PACKED)
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(ends)


def _has_pillow() -> bool:
    from transformers.utils.import_utils import is_vision_available

    return bool(is_vision_available())
