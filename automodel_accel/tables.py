"""Tables for the terminal, short for deep models: places that differ only in a number share one line."""

import io
import re
from collections.abc import Iterable, Sequence

WIDTH = 118


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as text, at most `WIDTH` columns wide or as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    for name in header:
        grid.add_column(name, justify="right" if name in ("places", "calls") else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    out = io.StringIO()
    console = Console(file=out, width=min(Console().width, WIDTH), color_system=None, highlight=False, markup=False)
    console.print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n") + "\n"


def grouped_places(paths: Sequence[str]) -> str:
    """Dotted names with their numbers as *: "model.layers.*.mlp"."""
    patterns = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", path) or "(the model)" for path in paths)
    return ", ".join(patterns)
