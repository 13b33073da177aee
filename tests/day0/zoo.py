"""A tiny model of every type that transformers has: `python -m tests.day0.zoo` lists them.

model = tiny_model(Type("qwen3_vl", "vlm"))
model.model(**model.batch()).loss.backward()
"""

import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from automodel_accel.recipes.tiny.building import MAPPINGS, Type
from automodel_accel.recipes.tiny.images import Look
from automodel_accel.recipes.tiny.searching import Tiny, Unbuildable, Way, build, find_way, train

__all__ = ["Tiny", "Type", "Unbuildable", "Way", "find_way", "remembered", "tiny_model", "train", "types"]

logging.set_verbosity_error()
logging.disable_progress_bar()

REMEMBERED = Path(__file__).with_name("remembered.json")


def types(kind: str) -> list[Type]:
    """Every type of a mapping: kind is "causal" or "vlm"."""
    return [Type(name, kind) for name in MAPPINGS[kind]]


def tiny_model(type: Type, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tiny:
    """A tiny model of the type; the same weights for the same seed. Raises `Unbuildable`."""
    known = remembered().get(str(type))
    if isinstance(known, str):
        raise Unbuildable(known)
    return build(type, known or find_way(type), dtype, seed)


@cache
def remembered() -> Mapping[str, Way | str]:
    """Type -> how it is built, or why it cannot be, as found with the installed version of transformers; empty for another."""
    if not REMEMBERED.exists():
        return {}
    stored = json.loads(REMEMBERED.read_text(encoding="utf-8"))
    if stored["transformers"] != transformers.__version__:
        return {}
    return {name: found if isinstance(found, str) else _way(found) for name, found in stored["types"].items()}


def _way(found: Mapping[str, Any]) -> Way:
    image = found.get("image")
    return Way(**{**found, "image": image and Look(**image)})


if __name__ == "__main__":
    from tests.day0.census import main

    sys.exit(main(sys.argv[1:]))
