"""Where rows come from: files, folders, or the hub, all read by Hugging Face's datasets."""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from automodel_accel.data.settings import RowData, SquadData
from automodel_accel.demo import is_demo, resolve
from automodel_accel.kernels.facts import this_machine

Row = dict[str, Any]
# end of a file's name -> what datasets calls its reader
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
PACKED = (".gz", ".zst", ".bz2", ".xz")
SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def open_rows(settings: RowData) -> Any:
    """The rows that the settings name.

    Returns:
        A sequence of dictionaries; where they stream, an IterableDataset of datasets.

    Raises:
        ValueError: no such path or data set, no rows, files of several kinds or that are damaged, or datasets is not installed.
    """
    path = located(settings.path)
    if path.exists():
        rows = _local(settings, path)
    elif _means_a_path(settings.path):
        near = path.parent
        while not near.exists():
            near = near.parent
        raise ValueError(f"path {settings.path}: does not exist; {near.resolve()} does.")
    else:
        rows = _load(settings, settings.path, "no such local path; as a data set of the hub: ", name=settings.name)
    if not is_streamed(rows) and len(rows) == 0:
        raise ValueError(f"path {settings.path}, split {settings.split}: holds no rows; expected at least one.")
    if settings.limit is None:
        return rows
    if isinstance(rows, list):
        return rows[: settings.limit]
    return rows.take(settings.limit) if is_streamed(rows) else rows.select(range(min(settings.limit, len(rows))))


def located(path: str) -> Path:
    """The file or folder that a path means; one that is not there may be a name on the hub.

    Raises:
        ValueError: an unknown name of a demo, or a package that it takes is not installed.
    """
    return resolve(path) if is_demo(path) else Path(path).expanduser()


def is_streamed(rows: Any) -> bool:
    """Whether rows can only be read one after the other."""
    return not hasattr(rows, "__len__")


class RowStream:
    """Rows that are read one after the other, from the beginning or from where a reading was.

    Args:
        rows: An IterableDataset of datasets that nobody reads from.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self._beginning = self.position()

    def read(self, position: Any = None) -> Iterator[Row]:
        """The rows from a position on; None: from the first one on."""
        self._rows.load_state_dict(copy.deepcopy(self._beginning if position is None else position))
        return iter(self._rows)

    def position(self) -> Any:
        """Where the reading is, in JSON types."""
        return copy.deepcopy(self._rows.state_dict())


def require_datasets() -> Any:
    """The package datasets.

    Raises:
        ValueError: it is not installed.
    """
    if not this_machine().has("datasets"):
        raise ValueError(
            "data sets are read by the package datasets, which is not installed: `pip install automodel-accel[data]`. Token bins "
            "and mock data do without it."
        )
    import datasets

    return datasets


def _means_a_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or _reader(Path(text)) is not None


def _local(settings: RowData, path: Path) -> Any:
    if path.is_dir() and any((path / name).exists() for name in SAVED):
        return _saved(settings, path)
    files = _files(path, _split_name(settings.split)) if path.is_dir() else [path]
    if not path.is_dir() and _reader(path) is None:
        raise ValueError(f"path {path}: cannot be read; expected a name that ends in {', '.join(READERS)}.")
    readers = {_reader(file) for file in files}
    if len(readers) > 1:
        raise ValueError(
            f"path {path}: holds files of several kinds ({', '.join(sorted(map(str, readers)))}); expected one."
        )
    if isinstance(settings, SquadData) and len(files) == 1 and (nested := _nested(files[0])) is not None:
        return nested
    options = {"sample_by": "document"} if readers == {"text"} else {}
    split = _split_name(settings.split)
    return _load(settings, str(readers.pop()), data_files={split: [str(file) for file in files]}, **options)


def _reader(file: Path) -> str | None:
    name = file.with_suffix("") if file.suffix in PACKED else file
    return READERS.get(name.suffix)


def _split_name(split: str) -> str:
    return split.split("[")[0].split("+")[0]


def _files(folder: Path, split: str) -> list[Path]:
    """The files of a split: those that are named after it, or all where none is named after any split."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _reader(file) is not None)
    if not files:
        raise ValueError(f"path {folder}: holds no file that ends in {', '.join(READERS)}.")
    by_split = {known: [file for file in files if file.name.startswith(words)] for known, words in SPLITS.items()}
    wanted = next((known for known, words in SPLITS.items() if split in words), split)
    named = by_split.get(wanted) or [file for file in files if file.name.startswith(split)]
    if named:
        return named
    others = [known for known, found in by_split.items() if found]
    if others:
        raise ValueError(
            f"path {folder}: no file is named after the split {split!r}; there are files of {', '.join(others)}."
        )
    return files


def _saved(settings: RowData, folder: Path) -> Any:
    loaded = require_datasets().load_from_disk(str(folder))
    if isinstance(loaded, dict):
        if settings.split not in loaded:
            raise ValueError(f"path {folder}: no split {settings.split!r}; there are {', '.join(loaded)}.")
        loaded = loaded[settings.split]
    return loaded.to_iterable_dataset() if settings.streaming else loaded


def _load(settings: RowData, what: str, before: str = "", **options: Any) -> Any:
    datasets = require_datasets()
    try:
        return datasets.load_dataset(what, split=settings.split, streaming=settings.streaming, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, StopIteration) as error:
        why = error.__cause__ or error
        said = " ".join(str(why).split()) or "a file without a row"
        said = " ".join(str(why).split())[:400] or "no row in it"
        raise ValueError(f"path {settings.path}, split {settings.split}: {before}{said}") from error


def _nested(file: Path) -> list[Row] | None:
    """The questions of a file in SQuAD's official schema (data, paragraphs, qas), one row each; None for other files."""
    if file.suffix != ".json":
        return None
    with file.open(encoding="utf-8") as opened:
        if '"data"' not in opened.read(256):
            return None
        opened.seek(0)
        try:
            came = json.load(opened)
        except json.JSONDecodeError:
            return None  # JSON lines, or damaged: datasets says which
    if not isinstance(came, dict) or not isinstance(came.get("data"), list):
        return None
    return [_question(article, paragraph, qa) for article, paragraph, qa in _questions(came["data"], file)]


def _questions(articles: Sequence[Any], file: Path) -> Iterator[tuple[Row, Row, Row]]:
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    yield article, paragraph, qa
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'path {file}: has "data" at its top, as SQuAD\'s official files, but not their paragraphs and qas inside ({error!r}).'
        ) from error


def _question(article: Row, paragraph: Row, qa: Row) -> Row:
    answers = qa.get("answers") or []
    return {
        "id": qa.get("id"),
        "title": article.get("title"),
        "context": paragraph.get("context"),
        "question": qa.get("question"),
        "answers": {name: [answer.get(name) for answer in answers] for name in ("text", "answer_start")},
    }
