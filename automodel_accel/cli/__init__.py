"""The command `automodel-accel`. Each command imports what it needs when it runs."""

import sys
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from automodel_accel.cli import (
    benching,
    converting,
    errors,
    evaluating,
    exporting,
    generating,
    launching,
    training,
)

app = typer.Typer(
    name="automodel-accel",
    help="Train Hugging Face models faster and leaner, with proof that they still compute the same thing.",
    epilog="Examples:\n\nautomodel-accel doctor\n\nautomodel-accel plan Qwen/Qwen3-0.6B",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}  # overrides of a recipe
app.command(epilog=training.EPILOG, context_settings=OPEN)(training.train)
app.command(epilog=benching.EPILOG, context_settings=OPEN)(benching.bench)
app.command(name="eval", epilog=evaluating.EPILOG, context_settings=OPEN)(evaluating.evaluate)
app.command(epilog=generating.EPILOG)(generating.generate)
app.command(epilog=exporting.EPILOG)(exporting.export)
app.command(name="convert-recipe", epilog=converting.EPILOG)(converting.convert_recipe)
app.add_typer(launching.app, name="launch")


def main() -> None:
    """The entry point of the command and of python -m automodel_accel."""
    app(prog_name="automodel-accel")


@app.command(
    epilog="Examples:\n\nautomodel-accel plan Qwen/Qwen3-0.6B\n\nautomodel-accel plan ./my-model --set loss=False --json\n\n"
    "automodel-accel plan ./my-model --mesh shard=8 --seq-len 8192 --recompute selective --memory 80\n\n"
    "automodel-accel plan ./my-model --mesh shard=8,tensor=8 --bandwidth shard=50 --bandwidth tensor=400 --explain"
)
def plan(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or a config.json.", metavar="MODEL")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of AccelConfig, such as norm=False or loss=torch; repeatable.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    mesh: Annotated[
        list[str] | None,
        typer.Option(
            help="Memory and communication on this many GPUs instead: replicate, shard, context, tensor, and other settings of Mesh.",
            metavar="AXIS=SIZE,...",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="With --mesh: rows of a micro-batch of a data rank.")] = 1,
    seq_len: Annotated[int, typer.Option(help="With --mesh: tokens of a row.")] = 4096,
    accumulate: Annotated[int, typer.Option(help="With --mesh: micro-batches of an optimizer step.")] = 1,
    sync: Annotated[
        str,
        typer.Option(help="With --accumulate: whether gradients are summed in the last micro-batch, or in every one."),
    ] = "last",
    lora: Annotated[int | None, typer.Option(help="With --mesh: adapters of this rank on all linears.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --mesh: of the parameters at rest; default: what the config says.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="With --mesh: adamw, sgd_momentum or sgd.")] = "adamw",
    recompute: Annotated[str | None, typer.Option(help="selective, mlp or full, as --set recompute=...")] = None,
    memory: Annotated[
        float | None, typer.Option(help="With --mesh: GiB of one GPU. Does it fit, else what would?")
    ] = None,
    reserve: Annotated[
        float,
        typer.Option(help="Share of that memory for what is not counted: context, NCCL, fragments.", min=0, max=0.9),
    ] = 0.1,
    fail: Annotated[bool, typer.Option("--fail", help="Exit code 1 where it does not fit.")] = False,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option(help="With --mesh: GB a second that one rank sends along an axis; repeatable.", metavar="AXIS=GB"),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="With --mesh: the formulae too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What would be swapped in a model on this machine, and what refused and why; or what a run of it needs. Reads no weights."""
    from automodel_accel.cli.meta_model import build_on_meta

    try:
        chosen = dict(_setting(text) for text in settings or ()) | ({"recompute": recompute} if recompute else {})
        if mesh is None:
            print(_swaps(build_on_meta(model), chosen, json))
            return
        job = {"rows": batch_size, "length": seq_len, "accumulate": accumulate, "sync": sync, "optimizer": optimizer}
        import automodel_accel
        from automodel_accel.cli import scale

        question = scale.Question(gib=memory, reserve=reserve, bandwidth=scale.bandwidth_of(bandwidth or ()))
        of_mesh = scale.mesh_of(mesh)
        adapted = scale.prepared(build_on_meta(model), dtype, lora)
        found = scale.answer(adapted, automodel_accel.plan(adapted, chosen), {**job, "mesh": of_mesh}, question)
    except ValueError as error:
        errors.fail(str(error))
    print(dumps(scale.data_of(found), indent=2) if json else scale.text_of(found))
    if explain and not json:
        print(scale.explained(found))
    if fail and found.fits is False:
        raise typer.Exit(1)


@app.command(
    epilog="Examples:\n\nautomodel-accel merge out/adapter --to out/merged\n\n"
    "automodel-accel merge out/adapter --base ./my-model --to out/merged"
)
def merge(
    adapter: Annotated[Path, typer.Argument(help="A folder written by PEFT's save_pretrained.", metavar="ADAPTER")],
    to: Annotated[Path, typer.Option(help="The folder to write; new or empty.", metavar="FOLDER")],
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id of the base model; default: what the adapter names.")
    ] = None,
) -> None:
    """Merge a LoRA adapter into its base model, and write a plain model that needs no PEFT."""
    from automodel_accel.cli.merging import merge_adapter

    try:
        print(merge_adapter(adapter, to, base))
    except ValueError as error:
        errors.fail(str(error))


@app.command(epilog="Exit code: 0 when everything that is needed is there, 1 when something is missing or too old.")
def doctor() -> None:
    """What this machine offers, which kernels would run, and what each missing package would bring."""
    from automodel_accel.cli.findings import examine
    from automodel_accel.kernels.facts import this_machine

    findings, problems = examine(this_machine())
    print(findings)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(1)
    print("Everything that is needed is here.")


def _swaps(model: Any, settings: dict[str, Any], as_json: bool) -> str:
    import automodel_accel

    found = automodel_accel.plan(model, settings)
    return found.to_json() if as_json else str(found)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: expected NAME=VALUE, such as norm=False.")
    return name.strip(), {"true": True, "false": False}.get(value.strip().lower(), value.strip())
