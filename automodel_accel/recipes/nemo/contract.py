"""What a translation consists of: rules for keys, and what became of each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from automodel_accel.recipes.reading import Place


@dataclass(frozen=True, slots=True)
class To:
    """A key with a counterpart.

    Attributes:
        ours: "section.key"; "" where `value` says it.
        value: Their value -> ours, or a mapping of "section.key" -> value; None for a value that ours has without saying.
    """

    ours: str
    value: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True, slots=True)
class Ignored:
    """A key that changes nothing of what is computed, or that ours needs not be told.

    Attributes:
        why: In words.
    """

    why: str


@dataclass(frozen=True, slots=True)
class Differs:
    """A key for something beside the model's own loss that transformers' model does not have: it is trained without, and that is said.

    Attributes:
        why: In words.
    """

    why: str


@dataclass(frozen=True, slots=True)
class Unmapped:
    """A key that changes what is computed, for which there is no counterpart.

    Attributes:
        why: In words, and what to do.
    """

    why: str


Rule = To | Ignored | Differs | Unmapped
Chosen = Rule | Callable[[Any], Rule]  # by the value


@dataclass(frozen=True, slots=True)
class Note:
    """One key of theirs.

    Attributes:
        key: Dotted.
        value: Theirs.
        place: Where it was written.
        said: Our key, or why there is none.
    """

    key: str
    value: Any
    place: Place
    said: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key} = {_short(self.value)}: {self.said}"


@dataclass(slots=True)
class Translation:
    """A file of theirs in our words; every leaf of it is in one of the four lists.

    Attributes:
        recipe: Sections, as a YAML file of ours would have them.
        mapped: Keys with a counterpart.
        ignored: Keys that change nothing of what is computed.
        differs: Keys for what is left out, of which the model's own loss knows nothing.
        unmapped: Keys that change what is computed, and have no counterpart.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    mapped: list[Note] = field(default_factory=list)
    ignored: list[Note] = field(default_factory=list)
    differs: list[Note] = field(default_factory=list)
    unmapped: list[Note] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left that changes what is computed."""
        return not self.unmapped

    def put(self, key: str, value: Any) -> None:
        """Set "section.key"."""
        *above, last = key.split(".")
        place = self.recipe
        for name in above:
            place = place.setdefault(name, {})
        place[last] = value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
