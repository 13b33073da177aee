"""Folders that are made once, in Hugging Face's cache."""

import importlib.metadata
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME


def package_folder(module: str, advice: str) -> Path:
    """Where an installed package lies.

    Raises:
        ValueError: it is not installed; says what to do.
    """
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ValueError(advice)
    return Path(next(iter(spec.submodule_search_locations or ())))


def version_of(distribution: str) -> str:
    """Of an installed package; part of the name of what is made of it."""
    return importlib.metadata.version(distribution)


def made_once(name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache; where there is none, `write` fills it.

    An interrupted call leaves no half of one, and of several processes that make it at once one is first.
    """
    folder = Path(HF_HOME) / "automodel_accel" / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        unfinished = Path(parent) / folder.name
        unfinished.mkdir()
        write(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
            shutil.rmtree(unfinished)
    return folder


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Rows as JSON, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
