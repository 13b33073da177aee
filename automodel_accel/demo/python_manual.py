"""Documents for pretraining: the topics of Python's own help, which every Python has (PSF licence)."""

import importlib
import platform
from pathlib import Path

from automodel_accel.demo.cache import made_once, write_lines

EVERY = 10  # of so many topics one is held out


def folder() -> Path:
    """train.jsonl and validation.jsonl, of {"text": ...}: a topic each."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    texts = [topics[name] for name in sorted(topics)]

    def write(made: Path) -> None:
        write_lines(made / "train.jsonl", ({"text": text} for at, text in enumerate(texts) if at % EVERY))
        write_lines(made / "validation.jsonl", ({"text": text} for text in texts[::EVERY]))

    return made_once(f"python-manual-{platform.python_version()}", write)
