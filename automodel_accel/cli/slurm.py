"""automodel-accel launch: a recipe or a script on all GPUs of some SLURM nodes, or of this machine, by torchrun."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

TORCHRUN = ("-m", "torch.distributed.run")
GRACE = 15  # seconds before the end of the limit at which processes that have not ended are killed
RECIPES = (".yaml", ".yml")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SCRIPT = """\
#!/bin/bash
{directives}

# written by: automodel-accel launch slurm; submit again by: sbatch {path}
set -euo pipefail
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${{nodes%%$'\\n'*}}
port=$((20000 + SLURM_JOB_ID % 20000))
{exports}
# one torchrun a node; they meet at the first one
srun {srun} \\
    {python} {torchrun} --nnodes {nodes} --nproc-per-node {processes} \\
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:$port" \\
    {command} &
step=$!

# {stop_before} s before the time limit: all processes get SIGTERM, save a checkpoint and end
stopped=
trap 'stopped=1; kill -TERM "$step"' USR1
code=0
wait "$step" || code=$?
if [ -n "$stopped" ]; then
    code=0
    wait "$step" || code=$?{requeue}
fi
exit "$code"
"""
_REQUEUE = """
    scontrol requeue "$SLURM_JOB_ID"  # goes on from its last checkpoint
    exit 0"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """What is asked of SLURM.

    Attributes:
        script: A recipe or a Python file.
        arguments: Its own.
        name: Of the job.
        nodes: Number of nodes.
        gpus_per_node: Of each; one process a GPU.
        cpus_per_task: Of each node; None for what the partition gives.
        partition: Of the cluster, or None.
        account: That pays, or None.
        time: Limit, as SLURM writes it: "4:00:00", or None.
        container: Image for pyxis, or None.
        mounts: FROM:TO, for the container.
        environment: NAME=VALUE, for all processes.
        stop_before: Seconds before the limit at which all processes get SIGTERM.
        requeue: Whether the job is then queued again.
        python: That runs torchrun.

    Raises:
        ValueError: a value that SLURM or torchrun cannot take.
    """

    script: str
    arguments: tuple[str, ...] = ()
    name: str
    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    container: str | None = None
    mounts: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    stop_before: int = 300
    requeue: bool = False
    python: str | None = None

    def __post_init__(self) -> None:
        check_script(self.script)
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 1 or more.")
        if self.stop_before <= GRACE:
            raise ValueError(f"--stop-before is {self.stop_before}; expected more than {GRACE} seconds, to save in.")
        if self.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise ValueError(
                f"--time {self.time}: expected minutes, hours:minutes:seconds or days-hours:minutes, as sbatch takes it."
            )
        if self.mounts and self.container is None:
            raise ValueError("--mount is for a container; give --container too.")
        for pair in self.environment:
            if not _NAME.fullmatch(pair.partition("=")[0]) or "=" not in pair:
                raise ValueError(f"--env {pair}: expected NAME=VALUE.")
        if not self.name or "/" in self.name:
            raise ValueError(f"--name {self.name!r}: expected a name without a slash; its folder is called so.")
        values = (self.name, self.partition, self.account, self.container, *self.mounts)
        if any(character in value for value in values if value for character in "\n\r\0"):
            raise ValueError("a name with a line break cannot be written into a script for sbatch.")

    def text(self, folder: Path) -> str:
        """The script for sbatch, which is to lie in `folder`."""
        quoted = [f"export {pair.partition('=')[0]}={shlex.quote(pair.partition('=')[2])}" for pair in self.environment]
        quoted.append(f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={self.stop_before - GRACE}")
        return _SCRIPT.format(
            directives="\n".join(f"#SBATCH {option}" for option in self._directives(folder)),
            path=shlex.quote(str(folder / FILE)),
            exports="\n".join(quoted),
            srun=" ".join(map(shlex.quote, self._srun())),
            python=shlex.quote(self.python or ("python" if self.container else sys.executable)),
            torchrun=" ".join(TORCHRUN),
            nodes=self.nodes,
            processes=self.gpus_per_node,
            command=shlex.join(program(str(Path(self.script).absolute()), self.arguments)),
            stop_before=self.stop_before,
            requeue=_REQUEUE if self.requeue else "",
        )

    def _directives(self, folder: Path) -> list[str]:
        given = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "output": folder / "%j.log",
            "open-mode": "append",
            "signal": f"B:USR1@{self.stop_before}",
        }
        found = [f"--{name}={shlex.quote(str(value))}" for name, value in given.items() if value is not None]
        return [*found, "--requeue" if self.requeue else "--no-requeue"]

    def _srun(self) -> list[str]:
        found = ["--kill-on-bad-exit=1"]
        if self.container is not None:
            found.append(f"--container-image={self.container}")
        return [*found, f"--container-mounts={','.join(self.mounts)}"] if self.mounts else found


FILE = "job.sbatch"


def check_script(script: str) -> None:
    """Whether torchrun can run it.

    Raises:
        ValueError: it is neither a recipe nor a Python file, or it is not there.
    """
    path = Path(script)
    if path.suffix not in (".py", *RECIPES) or not path.is_file():
        raise ValueError(f"{script}: expected a recipe (.yaml) or a Python file that is there.")


def program(script: str, arguments: Sequence[str]) -> list[str]:
    """What torchrun is given: a Python file, or for a recipe the command that trains it.

    Raises:
        ValueError: a recipe that cannot be read: better here than when the job begins.
    """
    if Path(script).suffix not in RECIPES:
        return [script, *arguments]
    from automodel_accel.cli.training import as_overrides
    from automodel_accel.recipes.recipe import load

    load(Path(script), as_overrides(arguments))
    return ["-m", "automodel_accel", "train", script, *arguments]


def submit(job: SlurmJob, folder: Path) -> str:
    """Write the script into a new folder within `folder`, and hand it to sbatch.

    Returns:
        What was done, in a sentence.

    Raises:
        ValueError: there is no sbatch here, or it refused the script, which is kept.
    """
    if (sbatch := shutil.which("sbatch")) is None:
        raise ValueError(
            "sbatch is not on PATH: run this on a login node of a SLURM cluster, or print the script by --dry-run and copy it there; "
            "without SLURM, use automodel-accel launch local."
        )
    own = folder.absolute() / f"{job.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    own.mkdir(parents=True)
    path = own / FILE
    path.write_text(job.text(own), encoding="utf-8")
    done = subprocess.run([sbatch, str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"sbatch refused {path}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return f"{done.stdout.strip()}: {path}"


def run_here(script: str, arguments: Sequence[str], processes: int) -> int:
    """Run a script by torchrun on this machine; returns its exit code.

    Raises:
        ValueError: it is nothing that torchrun can run, or fewer than one process is asked for.
    """
    check_script(script)
    if processes < 1:
        raise ValueError(f"--gpus is {processes}; expected 1 or more.")
    command = [sys.executable, *TORCHRUN, "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*command, *program(script, arguments)], check=False).returncode
