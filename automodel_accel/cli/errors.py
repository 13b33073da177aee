"""How a command says that it cannot."""

import sys
from typing import NoReturn

import typer


def fail(sentence: str, code: int = 2) -> NoReturn:
    """Print it as an error, and end.

    Raises:
        typer.Exit: always.
    """
    print(f"error: {sentence}", file=sys.stderr)
    raise typer.Exit(code)
