"""Catalog: the checkpoints in a folder, which of them are complete, and which are kept."""

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from automodel_accel.checkpoint.errors import DamagedError
from automodel_accel.checkpoint.files import (
    PARTIAL,
    Digest,
    check_file,
    remove_folder,
    replace_text,
    sync_folder,
    to_json,
    write_file,
)

ABOUT = "checkpoint.json"  # what a checkpoint is, and the checksums of its files; its own stands beside it
LATEST = "LATEST"
NAME = re.compile(r"step-\d{8,}(-\d+)?")


@dataclass(frozen=True, slots=True)
class Entry:
    """A complete checkpoint.

    Attributes:
        folder: Where it is.
        step: Of the run.
        serial: Grows with each save, so that the last one is known also where a run went back to an earlier step.
        metrics: As given to `save`.
        files: Name -> bytes and SHA-256.
        about: All that ABOUT says.
    """

    folder: Path
    step: int
    serial: int
    metrics: Mapping[str, float]
    files: Mapping[str, Digest]
    about: Mapping[str, Any]

    def check(self, names: Sequence[str]) -> None:
        """Compare files with their checksums; DamagedError names the first that differs."""
        for name in names:
            check_file(self.folder / name, self.files[name])


def read_entry(folder: Path) -> Entry:
    """What a folder says about itself.

    Raises:
        DamagedError: ABOUT is missing, or not what was written.
    """
    path = folder / ABOUT
    try:
        outer = json.loads(path.read_bytes())
        about = outer["about"]
        if sha256(to_json(about)).hexdigest() != outer["sha256"]:
            raise DamagedError(f"{path} has other bytes than were written: its SHA-256 is not the recorded one.")
        files = {name: (int(size), str(digest)) for name, (size, digest) in about["files"].items()}
        return Entry(folder, about["step"], about["serial"], about["metrics"], files, about)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"{path} cannot be read: {error}.") from error


def finish(folder: Path, about: Mapping[str, Any]) -> None:
    """Write ABOUT, after which the folder is complete."""
    write_file(folder / ABOUT, [to_json({"about": about, "sha256": sha256(to_json(about)).hexdigest()})])
    sync_folder(folder)


def entries(root: Path) -> tuple[list[Entry], list[str]]:
    """The complete checkpoints, last saved first, and what is wrong with the others."""
    found, problems = [], []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_dir() and NAME.fullmatch(folder.name):
            try:
                found.append(read_entry(folder))
            except DamagedError as error:
                problems.append(str(error))
    return sorted(found, key=lambda entry: entry.serial, reverse=True), problems


def start(root: Path, step: int) -> str:
    """Make the folder to write into, and remove what a killed run left; the name that it will have when it is complete."""
    root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    name, again = f"step-{step:08d}", 1
    while (root / name).exists():
        again += 1
        name = f"step-{step:08d}-{again}"
    (root / (name + PARTIAL)).mkdir()
    return name


def remove_leftovers(root: Path) -> None:
    """Remove what was being written, or being removed, when a run was killed."""
    for path in root.glob(f"*{PARTIAL}"):
        if path.is_dir() and NAME.fullmatch(path.name.removesuffix(PARTIAL)):
            shutil.rmtree(path, ignore_errors=True)


def point_at(root: Path, name: str) -> None:
    """Let LATEST name a checkpoint."""
    replace_text(root / LATEST, name + "\n")


@dataclass(frozen=True, slots=True)
class Keep:
    """Which checkpoints stay.

    Attributes:
        last: How many of the last; None for all.
        best: How many of the best, beside these.
        metric: By which they are the best.
        greater_is_better: Whether a greater one is.
    """

    last: int | None
    best: int
    metric: str
    greater_is_better: bool

    def ranked(self, found: Sequence[Entry]) -> list[Entry]:
        """Those with the metric, best first; of equals the last."""
        with_metric = [
            entry for entry in found if self.metric in entry.metrics and math.isfinite(entry.metrics[self.metric])
        ]
        sign = -1.0 if self.greater_is_better else 1.0
        return sorted(with_metric, key=lambda entry: (sign * entry.metrics[self.metric], -entry.serial))

    def prune(self, root: Path) -> None:
        """Remove the others; the last complete one always stays."""
        found, _ = entries(root)
        if self.last is None:
            return
        stay = {entry.folder for entry in (*found[: max(self.last, 1)], *self.ranked(found)[: self.best])}
        for entry in found:
            if entry.folder not in stay:
                remove_folder(entry.folder)
