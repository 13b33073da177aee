"""The command `automodel-accel`. Each command imports what it needs when it runs."""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="automodel-accel",
    help="Train Hugging Face models faster and leaner, with proof that they still compute the same thing.",
    epilog="Examples:\n\nautomodel-accel doctor\n\nautomodel-accel plan Qwen/Qwen3-0.6B",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the command and of python -m automodel_accel."""
    app(prog_name="automodel-accel")


@app.command(
    epilog="Examples:\n\nautomodel-accel plan Qwen/Qwen3-0.6B\n\nautomodel-accel plan ./my-model --set loss=False --json"
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
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What would be swapped in a model on this machine, and what refused and why. Reads its config only, no weights."""
    import automodel_accel
    from automodel_accel.cli.meta_model import build_on_meta

    try:
        chosen = dict(_setting(text) for text in settings or ())
        found = automodel_accel.plan(build_on_meta(model), chosen)
    except ValueError as error:
        _fail(str(error))
    print(found.to_json() if json else found)


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
        _fail(str(error))


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


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: expected NAME=VALUE, such as norm=False.")
    return name.strip(), {"true": True, "false": False}.get(value.strip().lower(), value.strip())


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    raise typer.Exit(2)
