"""Which parts of the score matrix are computed at all: tiles of queries, each with the run of keys that they may see."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries [start, stop) of some rows of the batch, and the keys [first, last) that any of them sees.

    Attributes:
        rows: Rows of the batch, as a slice.
        start, stop: The queries.
        first, last: The keys.
    """

    rows: slice
    start: int
    stop: int
    first: int
    last: int


def tiles(
    queries: int, keys: int, causal: bool, window: int | None, documents_BS: torch.Tensor | None, size: int
) -> Iterator[Tile]:
    """Tiles of at most `size` queries that cover every visible pair, in a fixed order; none spans two documents.

    Reads `documents_BS`, so it must be on the CPU.
    """
    for rows, begin, end in _spans(queries, documents_BS):
        for start in range(begin, end, size):
            stop = min(start + size, end)
            first = begin if window is None else max(begin, start - window + 1)
            last = stop if causal else (keys if documents_BS is None else end)
            yield Tile(rows, start, stop, first, last)


def _spans(queries: int, documents_BS: torch.Tensor | None) -> Iterator[tuple[slice, int, int]]:
    """(rows, begin, end) of each document."""
    if documents_BS is None:
        yield slice(None), 0, queries
        return
    same_in_all = documents_BS.shape[0] == 1
    for row, numbers in enumerate(documents_BS):
        starts = (torch.nonzero(numbers[1:] != numbers[:-1])[:, 0] + 1).tolist()
        for begin, end in zip([0, *starts], [*starts, queries], strict=True):
            yield slice(None) if same_in_all else slice(row, row + 1), begin, end


def hides(tile: Tile, causal: bool, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which pairs inside a tile are invisible: bool, [queries, keys]; None where all are visible."""
    if not causal and window is None:
        return None
    ago = torch.arange(tile.start, tile.stop, device=device)[:, None]
    ago = ago - torch.arange(tile.first, tile.last, device=device)
    hidden = ago < 0 if causal else torch.zeros_like(ago, dtype=torch.bool)
    return hidden if window is None else hidden | (ago >= window)
