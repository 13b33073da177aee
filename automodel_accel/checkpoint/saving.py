"""Saving: one checkpoint from the copies of its tensors to its name, by all ranks together."""

import platform
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from automodel_accel.checkpoint import catalog
from automodel_accel.checkpoint.agreement import Agreement
from automodel_accel.checkpoint.errors import CheckpointError
from automodel_accel.checkpoint.files import PARTIAL, Digest, move, remove_folder, sync_folder, to_json, write_file
from automodel_accel.checkpoint.tensors import DTYPES, Part, write_safetensors

FORMAT = 1
STATE = "state.json"
KINDS = ("model", "optimizer")


@dataclass(frozen=True, slots=True)
class Job:
    """What one rank saves.

    Attributes:
        step: Of the run.
        parts: "model" and "optimizer" -> the parts that this rank writes.
        event: After which the copies of them are there, on a GPU.
        shapes: "model" and "optimizer" -> name -> (dtype in safetensors' names, shape of the whole).
        of_rank: What is this rank's alone, in JSON's types.
        of_run: What is the run's, likewise.
        about: What stands in the catalog.
    """

    step: int
    parts: Mapping[str, Mapping[Part, torch.Tensor]]
    event: Any
    shapes: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]
    of_rank: Mapping[str, Any]
    of_run: Mapping[str, Any]
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Written:
    """What one rank wrote: checksums of its files, and where each part lies."""

    files: dict[str, Digest]
    parts: dict[str, list[tuple[Part, str, str]]]


def rank_file(rank: int) -> str:
    """The name of the file with what is one rank's alone."""
    return f"rank-{rank:05d}.json"


def save(root: Path, job: Job, keep: catalog.Keep, agreement: Agreement[Any]) -> Path:
    """Write a checkpoint; where it lies.

    Raises:
        CheckpointError: on any rank; on all of them. What was written of it is removed.
    """
    name: str = agreement.alone(lambda: catalog.start(root, job.step))
    partial = root / (name + PARTIAL)
    with ExitStack() as undo:
        if agreement.rank == 0:
            undo.callback(remove_folder, partial)
        written = agreement.together(lambda: _write_own(partial, job, agreement.rank, agreement.size))
        agreement.alone(lambda: _complete(partial, job, written))
        agreement.alone(lambda: move(partial, root / name))
        undo.pop_all()
    agreement.alone(lambda: catalog.point_at(root, name))
    agreement.alone(lambda: keep.prune(root))
    return root / name


def _write_own(partial: Path, job: Job, rank: int, size: int) -> Written:
    if not partial.is_dir():
        raise CheckpointError(
            f"{partial}: rank 0 has made it, but rank {rank} does not see it; use a folder that all share."
        )
    if job.event is not None:
        job.event.synchronize()
    written = Written({}, {})
    for kind in KINDS:
        if parts := job.parts[kind]:
            file = f"{kind}-{rank + 1:05d}-of-{size:05d}.safetensors"
            written.files[file], names = write_safetensors(partial / file, parts)
            written.parts[kind] = [(part, file, names[part]) for part in parts]
    written.files[rank_file(rank)] = write_file(partial / rank_file(rank), [to_json(job.of_rank)])
    sync_folder(partial)
    return written


def _complete(partial: Path, job: Job, written: list[Written]) -> None:
    tables: dict[str, dict[str, Any]] = {
        kind: {name: [dtype, shape, []] for name, (dtype, shape) in job.shapes[kind].items()} for kind in KINDS
    }
    for one in written:
        for kind, parts in one.parts.items():
            for (name, offsets, sizes), file, key in parts:
                tables[kind][name][2].append([file, key, offsets, sizes])
    files = {name: digest for one in written for name, digest in one.files.items()}
    files[STATE] = write_file(partial / STATE, [to_json({**job.of_run, "tensors": tables})])
    found, _ = catalog.entries(partial.parent)
    serial = 1 + max((entry.serial for entry in found), default=0)
    catalog.finish(partial, {**job.about, "format": FORMAT, "serial": serial, "files": files})


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of the whole of each."""
    return {name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def versions() -> dict[str, str]:
    """Of what the run is made with."""
    found = {"python": platform.python_version()}
    for name in ("automodel-accel", "torch", "transformers", "peft", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
