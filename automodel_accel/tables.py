"""Tables for the terminal, short for deep models: places that differ only in a number share one line."""

import io
import re
from collections.abc import Iterable, Sequence

WIDTH = 118
NARROW = ("variant", "fusion", "places", "kernel", "calls")  # columns that are never wrapped


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as text, at most `WIDTH` columns wide or as wide as the terminal; a cell may have several lines.

    Without rows it is the title alone.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    if not rows:
        return f"{title}\n"
    several = any("\n" in cell for row in rows for cell in row)
    grid = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, leading=int(several)
    )
    for name in header:
        justify = "right" if name in ("places", "calls") else "left"
        grid.add_column(name, justify=justify, no_wrap=name in NARROW, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        grid.add_row(*row)
    out = io.StringIO()
    console = Console(file=out, width=min(Console().width, WIDTH), color_system=None, highlight=False, markup=False)
    console.print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n") + "\n"


def grouped_places(paths: Sequence[str]) -> str:
    """Dotted names; those that differ only in numbers as one, with * for the numbers: "model.layers.*.mlp"."""
    alike: dict[str, list[str]] = {}
    for path in paths:
        alike.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", path), []).append(path)
    return ", ".join((of[0] or "the model") if len(of) == 1 else pattern for pattern, of in alike.items())
