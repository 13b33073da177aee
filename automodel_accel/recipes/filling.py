"""Dataclasses from entries: types are checked, unknown keys are errors, and all problems of a recipe are said at once."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from automodel_accel.kernels.contract import unknown_name
from automodel_accel.recipes.reading import Entry, RecipeError, said, scalar

Filled = TypeVar("Filled")
KIND = (
    "kind"  # the key that says which dataclass of a union a mapping is: the field that is a Literal of one word in each
)


def fill(kind: type[Filled], entry: Entry) -> Filled:
    """An instance of the dataclass `kind`.

    Fields may be bool, int, float, str, Path, Literal, a dataclass, a union (of dataclasses: told apart by their Literal field
    `kind`), tuple[X, ...], list[X] or dict[str, X]. Any takes everything.

    Args:
        kind: The dataclass. A ValueError of its `__post_init__` is said with the place of the mapping.
        entry: The mapping that was read.

    Raises:
        RecipeError: one line a problem: the place, the key, what came, what was expected.
    """
    problems: list[str] = []
    made = _dataclass(kind, entry, "", problems)
    if problems:
        raise RecipeError("\n".join(problems))
    return made  # type: ignore[no-any-return]


def to_plain(value: Any) -> Any:
    """What `fill` took: dataclasses as mappings, all fields included; what yaml.safe_dump and json.dumps write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(value: Any) -> str:
    """`to_plain` as YAML, in the order of the fields."""
    return yaml.dump(to_plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that YAML 1.2 would take for a number, such as "1e-4"; PyYAML's own rules are those of 1.1."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


class _Problem(Exception):
    """What is wrong with one value, without its place."""


def _dataclass(kind: Any, entry: Entry, path: str, problems: list[str]) -> Any:
    if not isinstance(entry.value, dict):
        _add(problems, entry, path, f"expected a mapping ({_keys(kind)}), got {said(entry)}")
        return None
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    before, values = len(problems), {}
    for key, inner in entry.value.items():
        if key not in fields:
            _add(problems, inner, path, unknown_name("key", key, fields).rstrip("."))
            continue
        values[key] = _value(hints[key], inner, f"{path}.{key}" if path else key, problems)
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in entry.value and not has_default:
            _add(problems, entry, path, f"{name!r} is missing: expected {_expected(hints[name])}")
    if len(problems) > before:
        return None
    try:
        return kind(**values)
    except ValueError as error:
        _add(problems, entry, path, str(error).rstrip("."))
        return None


def _value(hint: Any, entry: Entry, path: str, problems: list[str]) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _union(hint, entry, path, problems)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, entry, path, problems)
    if origin in (list, tuple) and isinstance(entry.value, list):
        inner = get_args(hint)[0]
        made = [_value(inner, one, f"{path}[{number}]", problems) for number, one in enumerate(entry.value)]
        return tuple(made) if origin is tuple else made
    if origin is dict and isinstance(entry.value, dict):
        inner = get_args(hint)[1]
        return {key: _value(inner, one, f"{path}.{key}", problems) for key, one in entry.value.items()}
    try:
        return _scalar(hint, entry)
    except _Problem as problem:
        _add(problems, entry, path, str(problem))
        return None


def _union(hint: Any, entry: Entry, path: str, problems: list[str]) -> Any:
    options = sorted(get_args(hint), key=lambda option: option is str)  # text last: it would take what others mean
    classes = [option for option in options if dataclasses.is_dataclass(option)]
    if isinstance(entry.value, dict) and classes:
        chosen = classes[0] if len(classes) == 1 else _of_kind(classes, entry, path, problems)
        return None if chosen is None else _dataclass(chosen, entry, path, problems)
    attempts: list[list[str]] = []
    for option in options:
        attempts.append([])
        made = _value(option, entry, path, attempts[-1])
        if not attempts[-1]:
            return made
    nested = [attempt for attempt, option in zip(attempts, options, strict=True) if get_origin(option) is not None]
    if isinstance(entry.value, list | dict) and len(nested) == 1:
        problems += nested[0]
    else:
        _add(problems, entry, path, f"expected {_expected(hint)}, got {said(entry)}")
    return None


def _of_kind(classes: list[Any], entry: Entry, path: str, problems: list[str]) -> Any:
    assert isinstance(entry.value, dict)
    known = {word: one for one in classes for word in get_args(typing.get_type_hints(one)[KIND])}
    given = entry.value.get(KIND)
    if given is None:
        _add(problems, entry, path, f"{KIND!r} is missing: expected one of {', '.join(known)}")
        return None
    if not isinstance(given.value, str) or given.value not in known:
        _add(problems, given, path, unknown_name(KIND, str(given.plain()), known).rstrip("."))
        return None
    return known[given.value]


def _scalar(hint: Any, entry: Entry) -> Any:
    value = entry.value
    if hint is Any:
        return entry.plain()
    if get_origin(hint) is Literal:
        words = get_args(hint)
        if any(value == word and type(value) is type(word) for word in words):
            return value
        if isinstance(value, str) and all(isinstance(word, str) for word in words):
            raise _Problem(unknown_name("value", value, words).rstrip("."))
    elif hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    elif (hint is types.NoneType and value is None) or (hint in (bool, str) and type(value) is hint):
        return value
    elif hint is int and (type(value) is int or (type(value) is float and value.is_integer())):
        return int(value)
    elif hint is float and type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    raise _Problem(f"expected {_expected(hint)}, got {said(entry)}{_quoted(hint, value)}")


def _quoted(hint: Any, value: Any) -> str:
    return f'; for that text write "{value}"' if hint is str and isinstance(value, bool | int | float) else ""


def _expected(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_expected(option) for option in inner))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (list, tuple):
        return f"a list, each {_expected(inner[0])}"
    if dataclasses.is_dataclass(hint) or origin is dict:
        return f"a mapping ({_keys(hint)})" if origin is None else "a mapping"
    named = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return "null" if hint is types.NoneType else named.get(hint, "a value")


def _keys(kind: Any) -> str:
    return ", ".join(field.name for field in dataclasses.fields(kind) if field.init)


def _add(problems: list[str], entry: Entry, path: str, problem: str) -> None:
    problems.append(f"{entry.place}: {path + ': ' if path else ''}{problem}.")
