"""Counts: what became of the rows of a data set, for people and for logs."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 3


class BadRow(Exception):
    """A row that cannot be used.

    Args:
        reason: What rows of this kind have in common: they are counted by it.
        detail: What came in this one.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(slots=True)
class Counts:
    """What became of the rows that were read, since this process began.

    Attributes:
        rows: Rows read.
        samples: Samples made of them.
        tokens: Their tokens.
        label_tokens: Those of them that carry loss.
        truncated: Samples whose end was cut off.
        split: Documents that became several samples.
        left_out: Reason -> rows or samples that were not used.
        examples: Reason -> the first of them, in words.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    label_tokens: int = 0
    truncated: int = 0
    split: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, row: int, bad: BadRow, strict: bool) -> None:
        """Count a row that is not used.

        Raises:
            ValueError: `strict`.
        """
        if strict:
            raise ValueError(f"row {row}: {bad} (strict: true; with strict: false such rows are counted and left out).")
        self.left_out[bad.reason] += 1
        shown = self.examples.setdefault(bad.reason, [])
        if len(shown) < EXAMPLES:
            shown.append(f"row {row}: {bad.detail}")

    def lines(self) -> list[str]:
        """The counts, one fact a line."""
        share = self.label_tokens / max(self.tokens, 1)
        found = [
            f"{self.rows:,} rows read, {self.samples:,} samples of {self.tokens:,} tokens, {share:.0%} of which carry loss"
        ]
        if self.truncated:
            found.append(f"{self.truncated:,} samples cut off at the end of a row")
        if self.split:
            found.append(f"{self.split:,} documents split over several rows")
        for reason, number in self.left_out.most_common():
            found.append(f"{number:,} left out, {reason}")
            found += [f"  {example}" for example in self.examples[reason]]
        return found

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON types."""
        names = ("rows", "samples", "tokens", "label_tokens", "truncated", "split")
        return {**{name: getattr(self, name) for name in names}, "left_out": dict(self.left_out)}


def shown(value: object, most: int = 120) -> str:
    """A value in one short line."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
