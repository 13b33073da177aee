"""The tables of a recipe's keys in docs/recipes.md, made of the dataclasses and their docstrings.

python -m tests.recipes.keys_table      # writes them
"""

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from automodel_accel.config import AccelConfig
from automodel_accel.data.settings import Batching, RowData, TemplateData
from automodel_accel.data.vision_settings import Captions
from automodel_accel.freezing import Freezing
from automodel_accel.parallel.mesh import Mesh
from automodel_accel.recipes.recipe import Distillation, Fp8, Lora, Model, Recipe, TextSource, VisionSource
from automodel_accel.train.logs import Logging
from automodel_accel.train.optimizers import Group, Optimizer
from automodel_accel.train.schedules import Schedule
from automodel_accel.train.settings import Checkpointing, Training

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "recipes.md"
BLOCK = re.compile(r"(<!-- keys -->\n).*?(<!-- keys end -->)", re.DOTALL)
ROW_OF_IMAGES = Captions.__mro__[1]
SHARED = (RowData, TemplateData, ROW_OF_IMAGES)  # what several kinds of data have; each has a table of its own
SECTIONS: tuple[tuple[str, Any], ...] = (
    ("recipe", Recipe),
    ("model", Model),
    ("model.freeze", Freezing),
    ("batching", Batching),
    ("accel", AccelConfig),
    ("lora", Lora),
    ("fp8", Fp8),
    ("mesh", Mesh),
    ("optimizer", Optimizer),
    ("optimizer.groups[]", Group),
    ("schedule", Schedule),
    ("training", Training),
    ("distillation", Distillation),
    ("checkpoint", Checkpointing),
    ("logging", Logging),
)


def tables() -> str:
    """All of them, as Markdown."""
    parts = [f"### {name}\n\n{_about(kind)}{table(kind, own(kind))}" for name, kind in SECTIONS]
    text = ("chat, instruction, squad, hellaswag, text", RowData), ("chat, instruction, squad", TemplateData)
    images = (", ".join(kind_of(one) for one in get_args(VisionSource)), ROW_OF_IMAGES)
    for kinds, shared in (*text, images):
        parts.append(f"### data of the kinds {kinds}\n\n{table(shared, own(shared))}")
    for one in (*get_args(TextSource), *get_args(VisionSource)):
        parts.append(f"### data of the kind {kind_of(one)}\n\n{_about(one)}{table(one, own(one))}")
    return "\n".join(parts)


def own(kind: Any) -> list[dataclasses.Field[Any]]:
    """The fields that a class has beside, or with another default than, what it shares with others."""
    above = {
        field.name: field
        for shared in SHARED
        if issubclass(kind, shared) and kind is not shared
        for field in dataclasses.fields(shared)
    }
    return [
        field
        for field in dataclasses.fields(kind)
        if not _tells(kind, field.name) and (field.name not in above or _default(field) != _default(above[field.name]))
    ]


def table(kind: Any, fields: list[dataclasses.Field[Any]]) -> str:
    """A row a key."""
    if not fields:
        return ""
    said, hints = meanings(kind), get_type_hints(kind)
    rows = [
        f"| `{field.name}` | {_type(hints[field.name])} | {_default(field)} | {_cell(said.get(field.name, ''))} |"
        for field in fields
    ]
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""])


def meanings(kind: Any) -> dict[str, str]:
    """Field -> what its docstring says, or that of a class above."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        found.update(_attributes(one))
    return found


def kind_of(settings: Any) -> str:
    """The word that a recipe tells it by."""
    return str(get_args(get_type_hints(settings)["kind"])[0])


def written(page: str) -> str:
    """The page with the tables between its markers."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{tables()}\n{match[2]}", page)


def _about(kind: Any) -> str:
    first = " ".join(inspect.cleandoc(kind.__doc__).split("\n\n")[0].split())
    return _cell(first) + "\n\n"


def _attributes(kind: Any) -> Iterator[tuple[str, str]]:
    lines = inspect.cleandoc(kind.__dict__.get("__doc__") or "").splitlines()
    if "Attributes:" not in lines:
        return
    names: list[str] = []
    text: list[str] = []
    for line in [*lines[lines.index("Attributes:") + 1 :], ""]:
        begun = re.fullmatch(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if begun or not line.strip():
            yield from ((name, " ".join(text)) for name in names)
            names, text = (begun[1].split(", "), [begun[2]]) if begun else ([], [])
        else:
            text.append(line.strip())
        if not line.strip():
            return


def _type(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type, inner)))
    if origin is Literal:
        return ", ".join(f"`{_yaml(one)}`" for one in inner)
    if origin in (list, tuple):
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"mapping of {_type(inner[1])}"
    if dataclasses.is_dataclass(hint):
        return "section of a `kind`" if _tells(hint, "kind") else "section"
    named = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path", Any: "any"}
    return "null" if hint is types.NoneType else named[hint]


def _tells(kind: Any, name: str) -> bool:
    """Whether it is the key that says which class a section is of: `kind`, of one word."""
    return name == "kind" and len(get_args(get_type_hints(kind).get(name))) == 1


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_yaml(field.default)}`"
    if field.default_factory is dataclasses.MISSING:
        return "needed"
    made = field.default_factory()
    return "its defaults" if dataclasses.is_dataclass(made) else f"`{_yaml(made)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value)


def _cell(text: str) -> str:
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}\b", yaml, text)
    text = re.sub(r'"([^"]*\*[^"]*)"', r"`\1`", text)  # else Markdown takes the stars
    return text.replace("|", "\\|").replace("<", "\\<")


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
