"""automodel-accel eval."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from automodel_accel.cli.errors import fail
from automodel_accel.cli.training import as_overrides, speak

EPILOG = (
    "Examples:\n\nautomodel-accel eval runs/smollm2_lora\n\nautomodel-accel eval runs/smollm2_lora --base\n\n"
    "automodel-accel eval demo:smollm2 --data.kind=chat --data.path=demo:chatterbot --data.split=validation\n\n"
    "automodel-accel eval Qwen/Qwen3-0.6B --task hellaswag --data.path=hellaswag_val.jsonl --limit 500"
)
LOSS, HELLASWAG = "loss", "hellaswag"


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a run, an adapter or a model; hub id; demo:NAME.")],
    task: Annotated[str, typer.Option(help="loss (and perplexity), or hellaswag (multiple choice).")] = LOSS,
    limit: Annotated[int | None, typer.Option(help="At most so many rows.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows, or endings, at once.")] = 8,
    seq_length: Annotated[int | None, typer.Option(help="Tokens of a row; default: the run's, or 1024.")] = None,
    base: Annotated[bool, typer.Option("--base", help="What was trained, as it was before.")] = False,
    step: Annotated[int | None, typer.Option(help="Of a run: its checkpoint of this step.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model on held-out data: a run's own validation sets, or data given as --data.KEY=VALUE, as in a recipe."""
    speak()
    try:
        if task not in (LOSS, HELLASWAG):
            raise ValueError(f"--task {task}: expected {LOSS} or {HELLASWAG}.")
        asked = _Asked(as_overrides(context.args), limit, batch_size, seq_length)
        found = _evaluate(model, task, asked, base, step)
    except ValueError as error:
        fail(str(error))
    print(json.dumps(found, indent=2) if as_json else _as_table(model, task, found))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is measured on."""

    overrides: Sequence[str]
    limit: int | None
    batch_size: int
    seq_length: int | None


def _evaluate(model: str, task: str, asked: _Asked, base: bool, step: int | None) -> dict[str, dict[str, Any]]:
    from automodel_accel.recipes.opening import open_model

    opened = open_model(model, base=base, step=step)
    if task == HELLASWAG:
        return {HELLASWAG: _choices(opened, asked)}
    sources = _sources(asked) or (opened.recipe.held_out if opened.recipe is not None else {})
    if not sources:
        raise ValueError(
            f"{model} has no validation data of its own; give some, such as --data.kind=chat --data.path=FILE.jsonl."
        )
    return {name: _loss(opened, source, asked) for name, source in sources.items()}


def _sources(asked: _Asked, **defaults: str) -> dict[str, Any]:
    """The data of the command line, filled as a recipe's."""
    if not asked.overrides and not defaults:
        return {}
    import yaml

    from automodel_accel.recipes.filling import fill
    from automodel_accel.recipes.reading import Entry, Place, overridden, parse
    from automodel_accel.recipes.recipe import Source

    given = parse(yaml.safe_dump({"data": defaults}), "command line") if defaults else Entry({}, Place("command line"))
    return {"data": fill(Source, overridden(given, asked.overrides)).data}


def _loss(opened: Any, source: Any, asked: _Asked) -> dict[str, Any]:
    import automodel_accel
    from automodel_accel.api import find_report
    from automodel_accel.data import Batching
    from automodel_accel.evaluation import held_out_loss
    from automodel_accel.recipes.building import open_source

    batching = opened.recipe.batching if opened.recipe is not None else Batching(seq_length=1024)
    batching = replace(
        batching, batch_size=asked.batch_size, **({"seq_length": asked.seq_length} if asked.seq_length else {})
    )
    if asked.limit is not None and hasattr(source, "limit"):
        source = replace(source, limit=asked.limit)
    batches = open_source(source, opened.tokenizer, batching)
    if find_report(opened.model) is None:
        automodel_accel.apply(opened.model, linear=False)  # its gain is in backward
    found = held_out_loss(opened.model, batches)
    return {"loss": found.loss, "perplexity": found.perplexity, "label_tokens": found.label_tokens}


def _choices(opened: Any, asked: _Asked) -> dict[str, Any]:
    from automodel_accel.data.sources import open_rows
    from automodel_accel.evaluation import multiple_choice, questions_of

    source = _sources(asked, kind=HELLASWAG, split="validation")["data"]
    tokenizer = getattr(opened.tokenizer, "tokenizer", opened.tokenizer)
    rows = open_rows(replace(source, limit=asked.limit) if asked.limit is not None else source)
    found = multiple_choice(opened.model, tokenizer, questions_of(rows), asked.batch_size)
    return {"acc": found.acc, "acc_norm": found.acc_norm, "questions": found.questions}


def _as_table(model: str, task: str, found: dict[str, dict[str, Any]]) -> str:
    from automodel_accel.tables import table

    header = ("data", *next(iter(found.values())))
    rows = [
        (name, *(f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" for value in one.values()))
        for name, one in found.items()
    ]
    return table(f"{model}: {task}", header, rows).rstrip("\n")
