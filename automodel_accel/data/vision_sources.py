"""Rows of a vision-language data set by their number: of a JSON or JSONL file, or of what `datasets` reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from automodel_accel.data.sources import located
from automodel_accel.data.vision_settings import MockImages, VisionSettings
from automodel_accel.kernels.facts import this_machine

Rows = Sequence[Mapping[str, Any]]


def open_rows(settings: VisionSettings) -> tuple[Rows, Path | None]:
    """The rows, and the folder that names of images are relative to.

    Images in Arrow and Parquet stay encoded: they are decoded where they are used.

    Raises:
        ValueError: no such file, a file of another format, no rows, or the package `datasets` is needed and not installed.
    """
    if isinstance(settings, MockImages):
        return [{"number": number} for number in range(settings.limit or settings.samples)], None
    path = _file_of(settings)
    if path.suffix in (".json", ".jsonl"):
        rows: Rows = _read_json(path)
        folder: Path | None = settings.images or path.parent
    else:
        rows, folder = _read_by_datasets(path, settings), settings.images
    if not len(rows):
        raise ValueError(f"{settings.path}: no rows; expected at least one.")
    if settings.limit is None or settings.limit >= len(rows):
        return rows, folder
    return (rows[: settings.limit] if isinstance(rows, list) else _first(rows, settings.limit)), folder


def _file_of(settings: VisionSettings) -> Path:
    """Of a folder with JSON files named after splits, that of the split."""
    path = located(settings.path)
    named = [path / f"{settings.split}{ending}" for ending in (".json", ".jsonl")] if path.is_dir() else []
    return next((file for file in named if file.is_file()), path)


def _read_json(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; expected JSON text.") from error
    rows = _json_lines(path, text) if path.suffix == ".jsonl" else _json(text, str(path))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of rows, each a mapping.")
    return rows


def _json_lines(path: Path, text: str) -> list[Any]:
    return [_json(line, f"{path}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} (line {error.lineno}, column {error.colno}).") from error


def _read_by_datasets(path: Path, settings: VisionSettings) -> Any:
    if not this_machine().has("datasets"):
        raise ValueError(
            f"{settings.path}: is read by the package datasets, which is not installed; `pip install datasets`, or name a "
            "JSON or JSONL file."
        )
    import datasets

    try:
        if path.suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(str(path) if path.exists() else settings.path, split=settings.split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{settings.path}: cannot be read: {error}") from error
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _first(rows: Any, count: int) -> Any:
    return rows.select(range(count))
