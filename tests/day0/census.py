"""Which types the zoo has: `python -m tests.day0.zoo`; with `--remember` it searches for all and writes remembered.json."""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
import transformers

from automodel_accel.recipes.tiny.building import BUILD_ERRORS
from tests.day0.zoo import REMEMBERED, Type, Unbuildable, Way, find_way, remembered, tiny_model, train, types

# how many there must be at least, of transformers 5.23: types that train, and those of them with an image
LEAST: Mapping[str, int] = MappingProxyType({"causal": 183, "vlm": 90, "image": 60})


@dataclass(frozen=True, slots=True)
class Entry:
    """What became of one type.

    Attributes:
        type: The type.
        built: Whether it was built and trained for a step.
        image: Whether its batch has an image.
        reason: Why it was not built, or why it has no image.
    """

    type: Type
    built: bool
    image: bool
    reason: str

    def __str__(self) -> str:
        state = ("image" if self.image else "text") if self.built else "-"
        return f"{self.type!s:40} {state:6} {self.reason}".rstrip()


def census(kinds: Sequence[str] = ("causal", "vlm"), processes: int = 2) -> list[Entry]:
    """Build every type and train it for a step."""
    return list(_each(_built, kinds, processes))


def count(entries: Sequence[Entry]) -> dict[str, int]:
    """How many causal and vision-language types train, and how many of the latter see an image."""
    found = {kind: sum(entry.built for entry in entries if entry.type.kind == kind) for kind in ("causal", "vlm")}
    return {**found, "image": sum(entry.image for entry in entries if entry.type.kind == "vlm")}


def main(arguments: Sequence[str]) -> int:
    """Print a row a type and the totals; 1 where there are fewer than there must be."""
    started = time.perf_counter()
    if "--remember" in arguments:
        _remember()
    entries = census()
    for entry in entries:
        _say(str(entry))
    found = count(entries)
    seconds = time.perf_counter() - started
    for name, least in LEAST.items():
        total = len(types("vlm" if name == "image" else name))
        _say(f"{name}: {found[name]} of {total}, at least {least}")
    _say(f"transformers {transformers.__version__}, {seconds:.0f} s")
    return int(any(found[name] < least for name, least in LEAST.items()))


def _remember() -> None:
    """Search for a way to build every type, and store those that take more than the first attempt without an image."""
    stored = {str(type): _plain(found) for type, found in _each(_searched, ("causal", "vlm"), 2)}
    text = {"transformers": transformers.__version__, "types": stored}
    REMEMBERED.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    remembered.cache_clear()


def _plain(found: Way | str) -> Any:
    if isinstance(found, str):
        return found
    return {name: value for name, value in asdict(found).items() if value not in (None, 0, {})}


def _searched(type: Type) -> tuple[Type, Way | str]:
    try:
        return type, find_way(type)
    except Unbuildable as reason:
        return type, str(reason)


def _built(type: Type) -> Entry:
    try:
        tiny = tiny_model(type)
        train(tiny.model, tiny.batch())
    except (Unbuildable, *BUILD_ERRORS) as error:
        return Entry(type, False, False, " ".join(str(error).split()))
    known = remembered().get(str(type))
    blind = known.blind if isinstance(known, Way) and known.blind else ""
    return Entry(type, True, tiny.has_image, blind)


def _each(work: Callable[[Type], Any], kinds: Sequence[str], processes: int) -> Iterator[Any]:
    chosen = [type for kind in kinds for type in types(kind)]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, chosen)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
