"""The committed figures, and what has become of them: worse, better, new, gone.

A figure is a number, of which less is better; or several numbers, of which less is better but for those in `MORE_IS_BETTER`.
Figures that depend on a package are compared only under the version of it that they were written with.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("figures.json")
MORE_IS_BETTER = {"widest"}

Figure = float | dict[str, float]
Figures = dict[str, Figure]


class WorseFigures(Exception):
    """Figures got worse, and nobody said why."""


@dataclass(slots=True)
class Change:
    """How figures differ from the committed ones; each entry is one line for a reader."""

    worse: dict[str, str] = field(default_factory=dict)
    stale: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"worse: {line}" for line in self.worse.values()] + [f"stale: {line}" for line in self.stale.values()]
        ways = []
        if self.worse:
            ways.append('mend what made it worse, or write it down with --write --worse "why"')
        if self.stale:
            ways.append("write what is no longer so with: python -m tests.budgets --write")
        return "\n".join([*lines, *ways])

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.worse or self.stale)


def compare(committed: Figures, found: Figures) -> Change:
    """Compare one group of figures."""
    change = Change()
    for name in sorted({*committed, *found}):
        if name not in found:
            change.stale[name] = f"{name} is no longer measured"
        elif name not in committed:
            change.stale[name] = f"{name} is new: {_text(found[name])}"
        elif found[name] != committed[name]:
            line = f"{name}: {_text(committed[name])} -> {_text(found[name])}"
            (change.worse if _is_worse(committed[name], found[name]) else change.stale)[name] = line
    return change


def _is_worse(old: Figure, new: Figure) -> bool:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return isinstance(old, dict) or isinstance(new, dict) or new > old
    return any((new[key] < old[key]) if key in MORE_IS_BETTER else (new[key] > old[key]) for key in old.keys() & new)


def _text(figure: Figure) -> str:
    return json.dumps(figure).replace('"', "")


def read(path: Path = PATH) -> dict[str, Any]:
    """The file: "groups", each with the versions it was written with and its figures; and "reasons" for what got worse."""
    return dict(json.loads(path.read_text())) if path.exists() else {"groups": {}, "reasons": {}}


def committed(group: str, versions: Mapping[str, str], path: Path = PATH) -> Figures | None:
    """The committed figures of a group; None where they were written with other versions, so that nothing is comparable."""
    entry = read(path)["groups"].get(group, {"versions": versions, "figures": {}})
    return entry["figures"] if entry["versions"] == versions else None


def write(
    group: str, found: Figures, versions: Mapping[str, str], worse: str | None = None, path: Path = PATH
) -> Change:
    """Write one group, and return what changed.

    Raises:
        WorseFigures: a figure got worse, and `worse` gives no reason. Nothing was written.
    """
    change = compare(committed(group, versions, path) or {}, found)
    if change.worse and not worse:
        raise WorseFigures(str(change))
    file = read(path)
    file["groups"][group] = {"versions": dict(versions), "figures": found}
    file["reasons"] |= dict.fromkeys(change.worse.values(), worse)
    path.write_text(_dumped(file))
    return change


def _dumped(file: dict[str, Any]) -> str:
    """JSON, sorted, one line a figure."""
    groups = (
        f"{json.dumps(name)}: {{\n"
        f'"versions": {json.dumps(group["versions"], sort_keys=True)},\n"figures": {_block(group["figures"])}\n}}'
        for name, group in sorted(file["groups"].items())
    )
    return '{\n"reasons": ' + _block(file["reasons"]) + ',\n"groups": {\n' + ",\n".join(groups) + "\n}\n}\n"


def _block(entries: Mapping[str, Any]) -> str:
    lines = (f"  {json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries))
    return "{\n" + ",\n".join(lines) + "\n}" if entries else "{}"
