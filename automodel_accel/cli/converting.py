"""automodel-accel convert-recipe."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from automodel_accel.cli.errors import fail

EPILOG = (
    "Examples:\n\nautomodel-accel convert-recipe llama3_2_1b_squad.yaml\n\n"
    "automodel-accel convert-recipe llama3_2_1b_squad.yaml --to llama.yaml\n\n"
    "Exit code: 0 when nothing that changes what is computed is left over, else 1."
)


def convert_recipe(
    theirs: Annotated[Path, typer.Argument(help="A YAML file of NeMo Automodel.", metavar="THEIRS")],
    to: Annotated[Path | None, typer.Option(help="File to write; default: standard output.", metavar="OURS")] = None,
    allow_unmapped: Annotated[
        bool,
        typer.Option("--allow-unmapped", help="Write it even where keys that change what is computed are left out."),
    ] = False,
) -> None:
    """Translate a recipe of NeMo Automodel, and name every key that has no counterpart."""
    import yaml

    from automodel_accel.recipes import nemo
    from automodel_accel.recipes.reading import text_of

    try:
        text = text_of(theirs)
        if not nemo.is_theirs(text):
            raise ValueError(f"{theirs}: no recipe of NeMo Automodel: it has neither a _target_ nor a step_scheduler.")
        found = nemo.translate(nemo.parse_theirs(text, str(theirs)))
    except ValueError as error:
        fail(str(error))
    _tell(found)
    if found.is_whole or allow_unmapped:
        written = yaml.safe_dump(found.recipe, sort_keys=False, width=120)
        if to is None:
            print(written, end="")
        else:
            to.write_text(written, encoding="utf-8")
    if not found.is_whole:
        raise typer.Exit(1)


def _tell(found: object) -> None:
    from automodel_accel.recipes.nemo import Translation

    assert isinstance(found, Translation)
    for heading, notes in (
        ("change nothing of what is computed here", found.ignored),
        ("stand for what the model is trained without", found.differs),
        ("change what is computed, and have no counterpart", found.unmapped),
    ):
        if notes:
            print(f"{len(notes)} keys {heading}:", file=sys.stderr)
            for note in notes:
                print(f"  {note}", file=sys.stderr)
