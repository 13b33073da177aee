"""Boxes: which parts of a whole tensor the local tensor of this rank holds, whatever the mesh and the placements."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

try:
    from torch.distributed.tensor.placement_types import _StridedShard
except ImportError:  # a later torch without it: then no tensor has it either
    _StridedShard = None  # type: ignore[assignment, misc]

Run = tuple[int, int, int]  # where it starts in the whole and in the local tensor, and its length


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor without gaps.

    Attributes:
        offsets: Where it starts in the whole tensor, a number a dimension.
        sizes: Its shape.
        inside: Where it starts in the local tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    inside: tuple[int, ...]

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """The view of the local tensor."""
        return local[tuple(slice(start, start + size) for start, size in zip(self.inside, self.sizes))]

    def overlap(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[tuple[slice, ...], "Box"] | None:
        """What a stored part has in common with this one: the slices of the stored part, and the box here; None if nothing."""
        starts = [max(mine, theirs) for mine, theirs in zip(self.offsets, offsets)]
        stops = [
            min(mine + my_size, theirs + their_size)
            for mine, my_size, theirs, their_size in zip(self.offsets, self.sizes, offsets, sizes)
        ]
        if any(stop <= start for start, stop in zip(starts, stops)):
            return None
        slices = tuple(slice(start - theirs, stop - theirs) for start, stop, theirs in zip(starts, stops, offsets))
        common = tuple(stop - start for start, stop in zip(starts, stops))
        inside = tuple(at + start - mine for at, start, mine in zip(self.inside, starts, self.offsets))
        return slices, Box(tuple(starts), common, inside)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor of this rank; shares its memory."""
    local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


def boxes(tensor: torch.Tensor) -> list[Box]:
    """The parts of the whole tensor that lie in `local_part(tensor)`; none where that is empty.

    Raises:
        ValueError: a placement that says less than where the values lie, such as a sum that is still to be made.
    """
    if not isinstance(tensor, DTensor):
        zeros = (0,) * tensor.dim()
        return [Box(zeros, tuple(tensor.shape), zeros)] if tensor.numel() else []
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None or tensor.numel() == 0:
        return []
    sharded = placements_by_dimension(tensor.placements)
    runs: list[list[Run]] = []
    for dimension, size in enumerate(tensor.shape):
        parts = [(placement, mesh.size(axis), coordinate[axis]) for axis, placement in sharded.get(dimension, [])]
        runs.append(list(as_runs(positions(size, parts))) if parts else [(0, 0, size)])
    return [
        Box(tuple(run[0] for run in one), tuple(run[2] for run in one), tuple(run[1] for run in one))
        for one in itertools.product(*runs)
    ]


def placements_by_dimension(placements: tuple[Placement, ...]) -> dict[int, list[tuple[int, Placement]]]:
    """Dimension of the tensor -> (axis of the mesh, placement) of each axis that cuts it."""
    found: dict[int, list[tuple[int, Placement]]] = {}
    for axis, placement in enumerate(placements):
        if placement.is_partial():
            raise ValueError(f"a DTensor is {placement}, which is not summed yet; expected Shard or Replicate.")
        if not placement.is_replicate():
            found.setdefault(placement.dim, []).append((axis, placement))  # type: ignore[attr-defined]
    return found


def positions(size: int, parts: list[tuple[Placement, int, int]]) -> torch.Tensor:
    """Where each row of the local tensor lies in the whole.

    FSDP2 over tensor parallel cuts what the later axis has cut already, and says so by a _StridedShard whose split_factor is the
    number of these parts. Cutting in that order is right also where rows do not divide, or the later axis is strided itself.

    Args:
        size: Rows of the whole.
        parts: Of each axis that cuts the dimension, first axis first: (placement, ranks of the axis, this rank).
    """
    rows = torch.arange(size)
    after: list[tuple[int, int]] = []
    for number, (placement, ranks, rank) in enumerate(parts):
        later = 1
        for _, count, _ in parts[number + 1 :]:
            later *= count
        factor = split_factor(placement)
        if factor > 1 and factor == later:
            after.insert(0, (ranks, rank))
        else:
            rows = torch.cat([chunk(piece, ranks, rank) for piece in torch.chunk(rows, factor)])
    for ranks, rank in after:
        rows = chunk(rows, ranks, rank)
    return rows


def split_factor(placement: Placement) -> int:
    """Pieces that are each cut over the ranks; 1 for a plain Shard.

    Raises:
        ValueError: a placement that cuts in another way.
    """
    if _StridedShard is not None and isinstance(placement, _StridedShard):
        return int(placement.split_factor)
    if isinstance(placement, Shard):
        return 1
    raise ValueError(f"a DTensor is placed by {placement}; checkpoints know Shard, _StridedShard and Replicate.")


def chunk(rows: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """Part `rank` as torch.chunk cuts, which may give fewer parts than asked for."""
    found = torch.chunk(rows, ranks)
    return found[rank] if rank < len(found) else rows[:0]


def as_runs(rows: torch.Tensor) -> Iterator[Run]:
    """The same as runs without gaps."""
    numbers = rows.tolist()
    start = 0
    for here in range(1, len(numbers) + 1):
        if here == len(numbers) or numbers[here] != numbers[here - 1] + 1:
            yield numbers[start], start, here - start
            start = here
