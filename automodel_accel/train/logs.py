"""What a run says: a line on the console, a row of JSON in a file, and trackers where they are asked for."""

import json
import logging
import math
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from automodel_accel.kernels.facts import environment, this_machine

logger = logging.getLogger("automodel_accel")
TRAINING, VALIDATION = "training.jsonl", "validation.jsonl"
Row = dict[str, float | int | str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logging:
    """Where figures go beside the console and the JSONL files of the run's folder.

    Attributes:
        every: Steps between two lines and rows.
        trackers: Of "tensorboard", "wandb" (offline where there is no key), "mlflow".
        project: What a tracker calls the project.
        settings: Of a tracker, by its name: what its `init` takes.

    Raises:
        ValueError: steps below 1, or settings of a tracker that is not asked for.
    """

    every: int = 1
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    project: str = "automodel_accel"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; expected a number of steps, at least 1.")
        if idle := sorted(set(self.settings) - set(self.trackers)):
            raise ValueError(
                f"settings of {', '.join(idle)}, which trackers does not name; expected one of {list(self.trackers)}."
            )


class Jsonl:
    """A file of rows, one JSON object a line. A row that cannot be written (a full disk) waits for the next one.

    Args:
        path: Of the file; what it holds stays.
        until: The step at which a run goes on: rows of later steps, which will be taken again, are removed.
    """

    def __init__(self, path: Path, until: int | None = None) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._written = path.stat().st_size if path.exists() else 0
        if until is not None and path.exists():
            self._cut(until)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; numbers that are not finite become text, since JSON has none."""
        self._waiting.append(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")
        was_stuck = len(self._waiting) > 1
        try:
            self._flush()
        except OSError as error:
            if not was_stuck:
                logger.warning("%s: a row could not be written (%s); it is kept and tried again.", self._path, error)

    def close(self) -> None:
        """Write what waits.

        Raises:
            OSError: it still cannot be written; the message says how many rows are lost.
        """
        try:
            self._flush()
        except OSError as error:
            raise OSError(
                error.errno, f"{len(self._waiting)} rows could not be written: {error.strerror}", str(self._path)
            ) from error

    def _flush(self) -> None:
        if not self._waiting:
            return
        with open(self._path, "ab") as file:
            file.truncate(self._written)  # half of a line that did not fit
            file.write("".join(self._waiting).encode())
            file.flush()
            self._written = file.tell()
        self._waiting.clear()

    def _cut(self, until: int) -> None:
        kept = [
            line for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True) if _step(line) <= until
        ]
        fresh = self._path.with_name(self._path.name + ".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        os.replace(fresh, self._path)
        self._written = self._path.stat().st_size


class Logs:
    """All that a run writes its figures to. Only rank 0 makes one.

    Args:
        folder: Of the run.
        settings: Which trackers.
        recipe: What the run is, for the trackers.
        until: As in `Jsonl`.

    Raises:
        ValueError: the package of a tracker is not installed.
    """

    def __init__(self, folder: Path, settings: Logging, recipe: Mapping[str, Any], until: int | None = None) -> None:
        self._training, self._validation = Jsonl(folder / TRAINING, until), Jsonl(folder / VALIDATION, until)
        self._trackers = [_tracker(name, folder, settings) for name in settings.trackers]
        for tracker in self._trackers:
            tracker.start()
            tracker.store_init_configuration(_flat(recipe))

    def training(self, row: Row) -> None:
        """Of a step: `step`, `epoch`, `loss`, `grad_norm`, `lr`, `mem`, `tps`, `tps_per_gpu`, `num_label_tokens`, `mfu`, ..."""
        self._write(self._training, row, "train")

    def validation(self, row: Row) -> None:
        """Of a validation: `name`, `step`, `epoch`, `val_loss`, `num_label_tokens`, ..."""
        self._write(self._validation, row, str(row.get("name", "validation")))

    def close(self) -> None:
        """Write what waits and end the trackers' runs.

        Raises:
            OSError: rows could not be written.
        """
        for tracker in self._trackers:
            tracker.finish()
        self._training.close()
        self._validation.close()

    def _write(self, file: Jsonl, row: Row, prefix: str) -> None:
        file.write(row)
        numbers = {
            f"{prefix}/{key}": value for key, value in row.items() if isinstance(value, int | float) and key != "step"
        }
        for tracker in self._trackers:
            tracker.log(numbers, step=row["step"])


def training_line(row: Mapping[str, Any]) -> str:
    """A step on the console: NeMo Automodel's line, which log parsers know, and what it leaves out behind it."""
    line = (
        f"step {row['step']} | epoch {row['epoch']} | loss {row['loss']:.4f} | grad_norm {row['grad_norm']:.4f} | "
        f"lr {row['lr']:.2e} | mem {row['mem']:.2f} GiB | tps {row['tps']:.2f}({row['tps_per_gpu']:.2f}/gpu) | "
        f"num_label_tokens {row['num_label_tokens']}"
    )
    return line if row.get("mfu") is None else f"{line} | mfu {100 * row['mfu']:.1f}%"


def validation_line(row: Mapping[str, Any]) -> str:
    """A validation on the console."""
    return (
        f'[val] name "{row["name"]}" | step {row["step"]} | epoch {row["epoch"]} | loss {row["val_loss"]:.4f} | '
        f"lr {row['lr']:.2e} | num_label_tokens {row['num_label_tokens']}"
    )


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> int:
    """Of a row; of half a row, which a killed run left, later than any."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return 1 << 62


def _flat(recipe: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{key}.")
        else:
            found[above + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _tracker(name: str, folder: Path, settings: Logging) -> Any:
    if not this_machine().has(name):
        raise ValueError(f"logging.trackers names {name}, which is not installed; pip install {name}.")
    from accelerate import tracking  # type: ignore[import-untyped]

    given = settings.settings.get(name, {})
    if name == "tensorboard":
        return tracking.TensorBoardTracker(settings.project, folder / name, **given)
    if name == "mlflow":
        return tracking.MLflowTracker(settings.project, logging_dir=str(folder / name), **given)
    offline = {} if _knows_wandb() else {"mode": "offline"}
    return tracking.WandBTracker(settings.project, **{"dir": str(folder), **offline, **given})


def _knows_wandb() -> bool:
    """Whether W&B would find a key, or was told what to do: by the environment, or where `wandb login` keeps it."""
    if {"WANDB_API_KEY", "WANDB_MODE"} & environment().keys():
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
