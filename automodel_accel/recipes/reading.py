"""YAML with places: every value knows the file, line and column that it came from, so that an error can say it.

Scalars are those of YAML 1.2's core schema: `1e-4` is a number, and `no`, `off` and `2024-01-01` are text.
Source: yaml.org/spec/1.2.2, section 10.3.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

EXTENDS = "extends"
_VARIABLE = re.compile(r"\$\{env:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<default>:-[^}]*)?\}")
_OTHER_VARIABLE = re.compile(r"\$\{[^}]*\}?")
_SCALARS: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"(null|Null|NULL|~|)"), lambda text: None),
    (re.compile(r"(true|True|TRUE|false|False|FALSE)"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]+(_[0-9]+)*"), lambda text: int(text.replace("_", ""))),
    (re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+"), lambda text: int(text, 0)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: -math.inf if text.startswith("-") else math.inf),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda text: math.nan),
)


class RecipeError(ValueError):
    """A recipe that cannot be read; each line of the message begins with a place."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written.

    Attributes:
        source: A file, or an option of the command line.
        line: From 1; 0 where the source has no lines.
        column: From 1.
    """

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Entry:
    """A value and its place: a scalar, a list of entries, or a dict of entries."""

    value: "Scalar | list[Entry] | dict[str, Entry]"
    place: Place

    def plain(self) -> Any:
        """The value alone, without places."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        return [entry.plain() for entry in self.value] if isinstance(self.value, list) else self.value


Scalar: TypeAlias = bool | int | float | str | None


def read(path: Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Entry:
    """A YAML file, on top of those that it extends, under the overrides of a command line.

    Args:
        path: Its top is a mapping. The key `extends` names a file, or a list of them, relative to it: mappings are merged key by
            key, later ones win, everything else is replaced.
        overrides: "optimizer.lr=1e-4": a dotted key and a YAML value.
        environment: What `${env:NAME}` and `${env:NAME:-default}` stand for.

    Raises:
        RecipeError: no such file, no YAML, a key given twice, a variable that is not set, files that extend one another in a
            circle, or an override that is none.
    """
    return overridden(_read_file(path, environment or {}, ()), overrides, environment)


def overridden(entry: Entry, overrides: Sequence[str], environment: Mapping[str, str] | None = None) -> Entry:
    """An entry under the overrides of a command line.

    Raises:
        RecipeError: an override that is none.
    """
    for text in overrides:
        entry = _merged(entry, _override(text, environment or {}))
    return entry


def text_of(path: Path) -> str:
    """What a file holds.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error


def _read_file(path: Path, environment: Mapping[str, str], under: tuple[Path, ...]) -> Entry:
    if path.resolve() in under:
        chain = " -> ".join(str(one) for one in (*under, path.resolve()))
        raise RecipeError(f"{path}: extends itself ({chain}); remove one of these `{EXTENDS}`.")
    entry = parse(text_of(path), str(path), environment)
    if not isinstance(entry.value, dict):
        raise RecipeError(f"{entry.place}: expected a mapping of sections, such as `model:`; got {said(entry)}.")
    own = Entry({key: value for key, value in entry.value.items() if key != EXTENDS}, entry.place)
    base = Entry({}, entry.place)
    for name in _names(entry.value[EXTENDS]) if EXTENDS in entry.value else ():
        base = _merged(base, _read_file(path.parent / name, environment, (*under, path.resolve())))
    return _merged(base, own)


def _names(entry: Entry) -> list[str]:
    names: list[Any] = entry.plain() if isinstance(entry.value, list) else [entry.value]
    if not names or not all(isinstance(name, str) for name in names):
        raise RecipeError(
            f"{entry.place}: {EXTENDS}: expected the name of a YAML file, or a list of them; got {said(entry)}."
        )
    return names


def parse(text: str, source: str, environment: Mapping[str, str] | None = None) -> Entry:
    """One YAML document.

    Raises:
        RecipeError: no YAML, or a key given twice.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(source, mark.line + 1, mark.column + 1) if mark else Place(source)
        context = f" {error.context}" if error.context else ""
        raise RecipeError(f"{place}: not YAML:{context} {error.problem}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not YAML: {error}") from error
    finally:
        loader.dispose()
    return Entry({}, Place(source, 1, 1)) if node is None else _entry(node, source, environment or {}, ())


def _entry(node: yaml.Node, source: str, environment: Mapping[str, str], above: tuple[yaml.Node, ...]) -> Entry:
    place = Place(source, node.start_mark.line + 1, node.start_mark.column + 1)
    if any(node is other for other in above):
        raise RecipeError(f"{place}: an anchor that lies inside of itself.")
    above = (*above, node)
    if isinstance(node, yaml.ScalarNode):
        _check_tag(node, place, "str")
        return Entry(_scalar(node, place, environment), place)
    if isinstance(node, yaml.SequenceNode):
        _check_tag(node, place, "seq")
        return Entry([_entry(child, source, environment, above) for child in node.value], place)
    assert isinstance(node, yaml.MappingNode)
    _check_tag(node, place, "map")
    merged: dict[str, Entry] = {}
    own: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        key_place = Place(source, key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        value = _entry(value_node, source, environment, above)
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{key_place}: a key that is no word.")
        if key_node.value == "<<" and key_node.style is None:
            merged = _from_anchors(value, key_place) | merged
            continue
        if key_node.value in own:
            raise RecipeError(
                f"{key_place}: {key_node.value!r} is given twice; the first is at {own[key_node.value].place}."
            )
        own[key_node.value] = Entry(value.value, key_place)
    return Entry(merged | own, place)


def _from_anchors(entry: Entry, place: Place) -> dict[str, Entry]:
    mappings = entry.value if isinstance(entry.value, list) else [entry]
    found: dict[str, Entry] = {}
    for mapping in mappings:
        if not isinstance(mapping.value, dict):
            raise RecipeError(f"{place}: `<<` takes a mapping, or a list of them; got {said(mapping)}.")
        found = mapping.value | found
    return found


def _check_tag(node: yaml.Node, place: Place, kind: str) -> None:
    plain = ("null", "bool", "int", "float", "timestamp", "merge", "value") if kind == "str" else ()
    if node.tag not in {f"tag:yaml.org,2002:{name}" for name in (kind, *plain)}:
        raise RecipeError(
            f"{place}: the tag {node.tag!r} is not read: a recipe holds text, numbers, lists and mappings."
        )


def _scalar(node: yaml.ScalarNode, place: Place, environment: Mapping[str, str]) -> Scalar:
    def looked_up(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if name not in environment and default is None:
            raise RecipeError(
                f"{place}: the environment variable {name} is not set; set it, or write ${{env:{name}:-default}}."
            )
        return environment.get(name, (default or "")[2:])

    text = _VARIABLE.sub(looked_up, node.value)
    if unknown := _OTHER_VARIABLE.search(_VARIABLE.sub("", node.value)):
        raise RecipeError(f"{place}: {unknown[0]!r} is not read; expected ${{env:NAME}} or ${{env:NAME:-default}}.")
    return text if node.style is not None else scalar(text)


def scalar(text: str) -> Scalar:
    """What a word without quotes means."""
    for pattern, construct in _SCALARS:
        if pattern.fullmatch(text):
            return construct(text)  # type: ignore[no-any-return]
    return text


def _override(text: str, environment: Mapping[str, str]) -> Entry:
    place = Place(f"--{text.removeprefix('--')}")
    key, equals, value = text.removeprefix("--").partition("=")
    names = key.split(".")
    if not equals or not all(names):
        raise RecipeError(f"{place}: expected --SECTION.KEY=VALUE, such as --optimizer.lr=1e-4.")
    entry = _placed(parse(value, str(place), environment) if value.strip() else Entry("", place), place)
    for name in reversed(names):
        entry = Entry({name: entry}, place)
    return entry


def _placed(entry: Entry, place: Place) -> Entry:
    """The same entry where every place is `place`: a command line has no lines and columns."""
    if isinstance(entry.value, dict):
        return Entry({key: _placed(value, place) for key, value in entry.value.items()}, place)
    return Entry(
        [_placed(value, place) for value in entry.value] if isinstance(entry.value, list) else entry.value, place
    )


def _merged(base: Entry, over: Entry) -> Entry:
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, value in over.value.items():
        merged[key] = _merged(merged[key], value) if key in merged else value
    return Entry(merged, over.place)


def said(entry: Entry) -> str:
    """What came, in words: "the text 'abc'", "the number 3", "a list"."""
    value = entry.value
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"the text {value!r}" if isinstance(value, str) else f"the number {value}"
