"""A sample: the tokens of one document and which of them carry loss; and many samples in little memory."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

IGNORED = -100  # the label that the loss leaves out


@dataclass(frozen=True, slots=True)
class Sample:
    """One document.

    Attributes:
        input_ids: Its tokens.
        labels: As many: the token itself where it carries loss, IGNORED elsewhere. The loss compares label t with what the model
            says after token t - 1, so the first one is always IGNORED.
    """

    input_ids: list[int]
    labels: list[int]


class Samples(Protocol):
    """Samples that can be reached by their number."""

    def __len__(self) -> int: ...

    def length(self, number: int) -> int:
        """Tokens of a sample."""

    def documents(self, number: int) -> Sequence[Sample]:
        """Its documents, none of which sees another: one, but for bins that say where documents end."""


class SampleStore:
    """Samples as arrays: 5 bytes a token."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._learned = bytearray()
        self._ends = array("q", [0])

    def add(self, sample: Sample) -> None:
        """Append a sample."""
        self._tokens.extend(sample.input_ids)
        self._learned.extend(label != IGNORED for label in sample.labels)
        self._ends.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def length(self, number: int) -> int:
        """Tokens of a sample."""
        return self._ends[number + 1] - self._ends[number]

    def documents(self, number: int) -> list[Sample]:
        """The sample, as a list of one."""
        start, stop = self._ends[number], self._ends[number + 1]
        tokens = self._tokens[start:stop].tolist()
        learned = self._learned[start:stop]
        return [Sample(tokens, [token if learn else IGNORED for token, learn in zip(tokens, learned)])]
