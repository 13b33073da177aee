"""Tensors: parts of sharded tensors to safetensors files and back, onto any mesh."""

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from automodel_accel.checkpoint.boxes import boxes, local_part
from automodel_accel.checkpoint.errors import DamagedError
from automodel_accel.checkpoint.files import BLOCK, Digest, to_json, write_file

# the names of dtypes in the format safetensors
DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Part = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, offsets, sizes


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a checkpoint.

    Attributes:
        dtype: In safetensors' names.
        shape: Of the whole.
        parts: (file, name in it, offsets, sizes) of each.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


def own_parts(tensors: Mapping[str, torch.Tensor]) -> dict[Part, int]:
    """The parts that this rank holds, with their bytes.

    Raises:
        ValueError: a dtype that the format does not have.
    """
    found: dict[Part, int] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors does not hold; leave it out or cast it.")
        for box in boxes(tensor):
            numbers = 1
            for size in box.sizes:
                numbers *= size
            found[name, box.offsets, box.sizes] = numbers * tensor.element_size()
    return found


def writers(held: list[dict[Part, int]]) -> dict[Part, int]:
    """Which rank writes each part: of those that hold it the one with the least to write, so that replicas share the work."""
    holders: dict[Part, list[int]] = {}
    for rank, parts in enumerate(held):
        for part in parts:
            holders.setdefault(part, []).append(rank)
    load = [0] * len(held)
    chosen = {}
    for part, ranks in holders.items():
        chosen[part] = min(ranks, key=lambda rank: (load[rank], rank))
        load[chosen[part]] += held[chosen[part]][part]
    return chosen


class Staging:
    """Copies of what is about to be written, in the memory of the host; page-locked for GPUs, and kept for the next time."""

    def __init__(self) -> None:
        self._kept: dict[Part, torch.Tensor] = {}

    def copy(self, tensors: Mapping[str, torch.Tensor], chosen: Iterable[Part]) -> dict[Part, torch.Tensor]:
        """A copy of each chosen part as it is at this point of the stream; on GPUs it is there once `event` has happened."""
        copies = {}
        for part, view in views(tensors, set(chosen)).items():
            kept = self._kept.get(part)
            if kept is None or kept.dtype != view.dtype:
                kept = torch.empty(view.shape, dtype=view.dtype, device="cpu", pin_memory=view.device.type == "cuda")
            copies[part] = kept.copy_(view, non_blocking=True)
        self._kept = copies
        return copies


def views(tensors: Mapping[str, torch.Tensor], chosen: set[Part]) -> dict[Part, torch.Tensor]:
    """The chosen parts where they lie."""
    found = {}
    for name, tensor in tensors.items():
        local = local_part(tensor)
        for box in boxes(tensor):
            if (part := (name, box.offsets, box.sizes)) in chosen:
                found[part] = box.of(local)
    return found


def write_safetensors(path: Path, parts: Mapping[Part, torch.Tensor]) -> tuple[Digest, dict[Part, str]]:
    """Write parts into one file, a tensor at a time; its checksum, and the name of each part in it.

    The format: length of the header in 8 bytes, the header in JSON, then the bytes of the tensors without gaps.
    """
    names = {part: key_of(part, parts) for part in parts}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part, tensor in parts.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[names[part]] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = to_json(header)
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return write_file(path, _contents(text, parts.values())), names


def _contents(header: bytes, tensors: Iterable[torch.Tensor]) -> Iterator[Any]:
    yield struct.pack("<Q", len(header)) + header
    for tensor in tensors:
        flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(flat), BLOCK):
            yield flat[start : start + BLOCK]


def key_of(part: Part, parts: Iterable[Part]) -> str:
    """The name of a part: that of the tensor, and where it starts if it does not start at its first value."""
    name, offsets, _ = part
    return name + "@" + ",".join(map(str, offsets)) if any(offsets) else name


def read(folder: Path, stored: Mapping[str, Stored], targets: Mapping[str, torch.Tensor]) -> None:
    """Fill tensors in place, each from the parts that it has something in common with.

    Raises:
        DamagedError: the parts do not cover a tensor.
    """
    wanted: dict[str, list[tuple[str, tuple[slice, ...], torch.Tensor]]] = {}
    for name, tensor in targets.items():
        local, missing = local_part(tensor), 0
        for box in boxes(tensor):
            missing += box.of(local).numel()
            for file, key, offsets, sizes in stored[name].parts:
                if (common := box.overlap(offsets, sizes)) is not None:
                    view = common[1].of(local)
                    missing -= view.numel()
                    wanted.setdefault(file, []).append((key, common[0], view))
        if missing:
            raise DamagedError(f"{folder}: {missing} values of {name} are in none of its files.")
    for file, requests in wanted.items():
        with safe_open(folder / file, framework="pt", device="cpu") as opened:
            for key, slices, view in requests:
                view.copy_(opened.get_slice(key)[slices] if slices else opened.get_tensor(key))
