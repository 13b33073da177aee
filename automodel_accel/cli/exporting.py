"""automodel-accel export."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from automodel_accel.cli.errors import fail
from automodel_accel.cli.training import speak

EPILOG = (
    "Examples:\n\nautomodel-accel export runs/smollm2_lora --to out/merged\n\n"
    "automodel-accel export runs/smollm2_lora --step 8 --adapter --to out/adapter\n\n"
    "automodel-accel export ./model --dtype bfloat16 --max-shard-size 2GB --to out/model"
)


def export(
    model: Annotated[str, typer.Argument(help="Folder of a run, an adapter or a model; hub id; demo:NAME.")],
    to: Annotated[Path, typer.Option(help="The folder to write; new or empty.", metavar="FOLDER")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The adapter alone, instead of merging it into the weights.")
    ] = False,
    step: Annotated[int | None, typer.Option(help="Of a run: its checkpoint of this step.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: bfloat16, float16, float32, or auto, as they were stored.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "5GB",
) -> None:
    """Write a plain folder that transformers, vLLM and TensorRT-LLM load: weights, config, tokenizer, model card."""
    speak()
    try:
        print(_export(model, to, adapter, step, dtype, max_shard_size))
    except ValueError as error:
        fail(str(error))


def _export(name: str, to: Path, adapter: bool, step: int | None, dtype: str, max_shard_size: str) -> str:
    from peft import PeftModel

    from automodel_accel.checkpoint import export as write
    from automodel_accel.recipes.opening import STORED, open_model

    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype {dtype}: expected bfloat16, float16, float32 or auto.")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is there already and not empty; expected a new folder.")
    opened = open_model(name, step=step, dtype=STORED if dtype == "auto" else dtype)
    made: Any = opened.model
    if adapter and not isinstance(made, PeftModel):
        raise ValueError(f"{name} has no adapter; leave --adapter out.")
    merged = isinstance(made, PeftModel) and not adapter
    if merged:
        made = made.merge_and_unload(safe_merge=True)
    write(made, to, max_shard_size=max_shard_size)
    if opened.tokenizer is not None:
        opened.tokenizer.save_pretrained(to)
    if step is None and opened.recipe is not None:
        _write_card(opened.recipe, Path(name).expanduser(), to, merged)
    how = ", the adapter merged into its weights" if merged else ""
    return f"{to}: {type(made).__name__} of {name}{how}"


def _write_card(recipe: Any, run: Path, to: Path, merged: bool) -> None:
    from automodel_accel.recipes.filling import to_plain
    from automodel_accel.recipes.running import FIGURES
    from automodel_accel.train.card import model_card

    if (run / FIGURES).is_file():
        figures = json.loads((run / FIGURES).read_text(encoding="utf-8"))
        (to / "README.md").write_text(model_card(to_plain(recipe), figures, merged), encoding="utf-8")
