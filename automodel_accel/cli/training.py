"""automodel-accel train."""

import logging
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from automodel_accel.cli.errors import fail

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
EPILOG = (
    "Examples:\n\nautomodel-accel train examples/recipes/smollm2_lora.yaml\n\n"
    "automodel-accel train recipe.yaml --optimizer.lr=1e-4 --training.steps=200 --nproc-per-node 8\n\n"
    "automodel-accel train recipe.yaml --dry-run --tiny"
)


def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A YAML file, ours or NeMo Automodel's.", metavar="RECIPE")],
    nproc_per_node: Annotated[
        int, typer.Option(help="Processes to start on this machine, one a GPU.", metavar="N", min=1)
    ] = 1,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole recipe, defaults included, and end.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build it on meta; print plan, memory and steps, and end.")
    ] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="With --dry-run: a tiny model of the same type, and two steps of it.")
    ] = False,
) -> None:
    """Train what a recipe says. Ctrl-C saves; the same command goes on. Any key of it can be given as --SECTION.KEY=VALUE."""
    try:
        overrides = as_overrides(context.args)
        if nproc_per_node > 1 and not (dry_run or print_config):
            raise typer.Exit(_under_torchrun(nproc_per_node, recipe, context.args))
        _train(recipe, overrides, print_config, dry_run, tiny, nproc_per_node)
    except ValueError as error:
        fail(str(error))
    except FloatingPointError as error:
        fail(str(error), code=1)


def as_overrides(arguments: Sequence[str]) -> list[str]:
    """ "--optimizer.lr=1e-4", or in two words "--optimizer.lr 1e-4".

    Raises:
        ValueError: a word that belongs to no option.
    """
    found: list[str] = []
    for word in arguments:
        if word.startswith("--"):
            found.append(word)
        elif found and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            raise ValueError(f"unexpected {word!r}: expected one recipe, and overrides such as --optimizer.lr=1e-4.")
    return found


def _train(recipe: Path, overrides: list[str], print_config: bool, dry_run: bool, tiny: bool, processes: int) -> None:
    from automodel_accel.recipes.filling import to_yaml
    from automodel_accel.recipes.recipe import load

    chosen = load(recipe, overrides)
    if print_config:
        print(to_yaml(chosen), end="")
        return
    if dry_run or tiny:
        from automodel_accel.recipes.dry_run import dry_run as tried

        speak()
        found = tried(chosen, tiny=tiny, world_size=processes if processes > 1 else None)
        print(found)
        raise typer.Exit(found.exit_code)
    _run(chosen, recipe)


def _run(chosen: Any, file: Path) -> None:
    speak()
    from automodel_accel.recipes.building import end_processes
    from automodel_accel.recipes.running import run_recipe

    ranks = chosen.mesh.ranks()
    outcome = run_recipe(chosen, ranks, said=lambda text: print(text, flush=True))
    if ranks.device_mesh is None or ranks.device_mesh.get_rank() == 0:
        print(_end(chosen.output, outcome, file))
    end_processes()


def _end(folder: Path, outcome: Any, file: Path) -> str:
    if not outcome.is_complete:
        return f"stopped at step {outcome.step}, saved; the same command goes on: automodel-accel train {file}"
    lines = [f"{outcome.step} steps done; {outcome.totals.tokens:,} tokens in {outcome.totals.seconds:.1f} s"]
    for name, loss in outcome.validation.items():
        before = outcome.validation_at_start.get(name)
        lines.append(f"{name}: loss {'' if before is None else f'{before:.4f} -> '}{loss:.4f}")
    left = ("figures.json", "training.jsonl", "validation.jsonl", "loss_curve.png", "checkpoints", "model")
    lines.append(f"in {folder}: {', '.join(name for name in left if (folder / name).exists())}")
    return "\n".join(lines)


def _under_torchrun(processes: int, recipe: Path, arguments: Sequence[str]) -> int:
    from automodel_accel.recipes.recipe import load

    load(recipe, as_overrides(arguments))  # its errors once, and before anything starts
    command = [sys.executable, *TORCHRUN, "--nproc-per-node", str(processes), "-m", "automodel_accel"]
    ended = subprocess.run([*command, "train", str(recipe), *arguments], check=False)
    return ended.returncode


def speak() -> None:
    """Warnings of the library on stderr; transformers' own talk is left out."""
    from transformers.utils import logging as talk

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names kernels that it does not have
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    talk.set_verbosity_error()  # type: ignore[no-untyped-call]
    talk.disable_progress_bar()  # type: ignore[no-untyped-call]
