"""Tables in a page, from rows: written between two markers, which say what they show.

<!-- bench: operation=linear_cross_entropy model=custom tokens=4096 device=cpu variants=eager,ours -->
<!-- bench end -->
"""

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from bench.rows import Row, ratio, read
from bench.screen import duration, limit

BLOCK = re.compile(r"(<!-- bench: (?P<asked>[^>]*?) -->\n)(?P<table>.*?)(<!-- bench end -->)", re.DOTALL)
COLUMNS = ("variant", "version", "time", "of the first", "share of the device's limit", "extra peak")


def main(page: Path, check: bool, console: Console) -> int:
    """Write the tables of a page; or only check them, with exit code 1 where one is not what the rows say."""
    text = page.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        raise ValueError(f"{page} has no markers, such as: <!-- bench: operation=rms_norm -->; <!-- bench end -->")
    made = fill(text, read())
    if not check:
        page.write_text(made, encoding="utf-8")
    elif made != text:
        changes = difflib.unified_diff(text.splitlines(), made.splitlines(), "page", "rows", lineterm="", n=0)
        console.print("\n".join(changes), markup=False, highlight=False)
        console.print(f"{page} does not say what the rows say; python -m bench tables writes it.")
        return 1
    return 0


def fill(text: str, rows: Sequence[Row]) -> str:
    """The text with every table made anew.

    Raises:
        ValueError: no row is what a marker asks for.
    """
    return BLOCK.sub(lambda found: f"{found[1]}{table(found['asked'], rows)}\n{found[4]}", text)


def table(asked: str, rows: Sequence[Row]) -> str:
    """The newest rows of each case that a marker asks for, as Markdown.

    Args:
        asked: Words name=value; operation, model, device, dtype, arch and any size choose rows, `variants` names those shown.
        rows: All there are, oldest first.
    """
    wanted = dict(word.split("=", 1) for word in asked.split())
    variants = wanted.pop("variants", "")
    chosen = [row for row in rows if all(_value(row, name) == value for name, value in wanted.items())]
    if not chosen:
        raise ValueError(f"no row in bench/results/ is what this marker asks for: {asked}")
    newest: dict[str, list[Row]] = {}
    for row in chosen:  # a later run of the same case takes the place of an earlier one
        key = f"{row['case']} {row['model']} {row['sizes']} {row['dtype']} {row['device_name']} {row['arch']}"
        if newest.get(key) and newest[key][0]["time"] != row["time"]:
            newest[key] = []
        newest.setdefault(key, []).append(row)
    keep = _named(variants.split(",")) if variants else lambda row: True
    return "\n\n".join(_one([row for row in its_rows if keep(row)]) for its_rows in newest.values())


def _value(row: Row, name: str) -> str:
    return str(row["sizes"].get(name, row.get(name)))


def _named(variants: Sequence[str]) -> Callable[[Row], bool]:
    return lambda row: row["variant"] in variants


def _one(rows: Sequence[Row]) -> str:
    if not rows:
        raise ValueError("a marker names variants of which there are no rows")
    first = rows[0]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = (
            row["variant"],
            row["version"] or "-",
            duration(row["seconds"]["p50"]),
            f"{ratio(row, first)[0]:.2f}",
            limit(row),
            f"{row['extra_peak_bytes'] / 1e6:.0f} MB",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return f"{_caption(first)}\n\n" + "\n".join(lines)


def _caption(row: Row) -> str:
    sizes = ", ".join(f"{name} {value}" for name, value in row["sizes"].items())
    model = "" if row["model"] == "custom" else f" of {row['model']}"
    cut = f" (cut: {row['cut']})" if row["cut"] else ""
    device = f"{row['device_name']} {row['arch']}"
    threads = f", {row['threads']} thread(s)" if row["device"] == "cpu" else ""
    source = f"`bench/results/{row['case']}.jsonl`, commit {row['commit']}{' with changes' if row['dirty'] else ''}, {row['time']}"
    return f"`{row['case']}`{model}, {sizes}{cut}, {row['dtype']}, on {device}{threads}, torch {row['versions']['torch']}: {source}"
