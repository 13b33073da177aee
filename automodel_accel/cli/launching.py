"""automodel-accel launch: its two commands."""

from pathlib import Path
from typing import Annotated

import typer

from automodel_accel.cli.errors import fail

app = typer.Typer(
    help="Run a recipe or a script on several GPUs, of this machine or of a SLURM cluster.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Script = Annotated[str, typer.Argument(help="A recipe or a Python file.", metavar="RECIPE|SCRIPT")]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(help="Its own arguments (of a recipe: overrides), after --.", metavar="[-- ARGS...]"),
]


@app.command(
    epilog="Examples:\n\nautomodel-accel launch slurm recipe.yaml --nodes 2 --time 4:00:00 -- --optimizer.lr=1e-4\n\n"
    "automodel-accel launch slurm train.py --nodes 2 --partition gpu --time 4:00:00 -- --lr 1e-4\n\n"
    "automodel-accel launch slurm train.py --nodes 2 --container image.sqsh --mount /data:/data --requeue --dry-run"
)
def slurm(
    script: Script,
    arguments: Arguments = None,
    nodes: Annotated[int, typer.Option(help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs, and processes, of a node.")] = 8,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPU cores of a node.")] = None,
    partition: Annotated[str | None, typer.Option(help="Of the cluster.")] = None,
    account: Annotated[str | None, typer.Option(help="That pays.")] = None,
    time: Annotated[str | None, typer.Option(help="Limit: minutes, or days-hours:minutes:seconds.")] = None,
    container: Annotated[str | None, typer.Option(help="Image, where the cluster has pyxis.", metavar="IMAGE")] = None,
    mount: Annotated[list[str] | None, typer.Option(help="For the container; repeatable.", metavar="FROM:TO")] = None,
    env: Annotated[list[str] | None, typer.Option(help="For all processes; repeatable.", metavar="NAME=VALUE")] = None,
    stop_before: Annotated[
        int, typer.Option(help="Seconds before the limit at which all processes get SIGTERM, to save a checkpoint.")
    ] = 300,
    requeue: Annotated[
        bool, typer.Option("--requeue", help="Queue the job again then, and after a failed node.")
    ] = False,
    python: Annotated[
        str | None, typer.Option(help="That runs it; default: this one, or python in a container.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the job; default: the script's.")] = None,
    folder: Annotated[Path, typer.Option(help="In which the script for sbatch and the log are kept.")] = Path("jobs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script for sbatch, and do nothing.")] = False,
) -> None:
    """Write a script for sbatch, keep it in a folder of its own, and submit it."""
    from automodel_accel.cli.slurm import SlurmJob, submit

    try:
        job = SlurmJob(
            script=script,
            arguments=tuple(arguments or ()),
            name=name or Path(script).stem,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            cpus_per_task=cpus_per_task,
            partition=partition,
            account=account,
            time=time,
            container=container,
            mounts=tuple(mount or ()),
            environment=tuple(env or ()),
            stop_before=stop_before,
            requeue=requeue,
            python=python,
        )
        print(job.text(folder.absolute()) if dry_run else submit(job, folder), end="" if dry_run else "\n")
    except ValueError as error:
        fail(str(error))


@app.command(epilog="Example:\n\nautomodel-accel launch local train.py --gpus 8 -- --lr 1e-4")
def local(
    script: Script,
    arguments: Arguments = None,
    gpus: Annotated[int, typer.Option(help="Number of processes.")] = 1,
) -> None:
    """Run a recipe or a script by torchrun on this machine; the exit code is torchrun's."""
    from automodel_accel.cli.slurm import run_here

    try:
        code = run_here(script, arguments or [], gpus)
    except ValueError as error:
        fail(str(error))
    raise typer.Exit(code)
