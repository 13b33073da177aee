"""Rendered: a row as text, and which part of it carries loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from automodel_accel.data.counts import BadRow, shown

Row = Mapping[str, Any]
Span = tuple[int, int]  # from, to: numbers of characters


@dataclass(frozen=True, slots=True)
class Rendered:
    """One text of a row.

    Attributes:
        text: As the model will read it.
        learned: The parts of it that carry loss, in order, apart from each other.
    """

    text: str
    learned: tuple[Span, ...]


class Renderer(Protocol):
    """Makes text of rows."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns without which no row can be used."""

    @property
    def with_ends(self) -> bool:
        """Whether the tokenizer's begin and end of a text go around it; a chat template writes them itself."""

    def __call__(self, row: Row) -> list[Rendered]:
        """The texts of a row.

        Raises:
            BadRow: it cannot be used.
        """


def cell(row: Row, column: str) -> Any:
    """What a row has in a column.

    Raises:
        BadRow: it has no such column, or nothing in it.
    """
    value = row.get(column)
    if value is None:
        filled = ", ".join(repr(key) for key, other in row.items() if other is not None)
        raise BadRow(f"without column {column!r}", f"has {filled or 'nothing'}")
    return value


def text_in(row: Row, column: str) -> str:
    """The text that a row has in a column.

    Raises:
        BadRow: it has none there, or white space alone.
    """
    value = cell(row, column)
    if not isinstance(value, str):
        raise BadRow(f"no text in column {column!r}", shown(value))
    if not value.strip():
        raise BadRow(f"empty text in column {column!r}", shown(value))
    return value
