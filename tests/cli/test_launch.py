"""automodel-accel launch: the script for sbatch, what a cluster would do with it, and what is said to wrong input."""

import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from automodel_accel.cli import app

ROOT = Path(__file__).resolve().parents[2]
HARD = ("--text", 'it\'s "two" words', "$HOME `id` \\ *", "")
# stands in for srun: a task a node, on this machine, to which signals are passed on
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$FAKE_LOG"; shift; done
pids=()
for ((node = 0; node < FAKE_NODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
for pid in "${pids[@]}"; do wait "$pid" || true; done
exit "$code"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; echo another; else echo "$@" >> "$FAKE_LOG"; fi
"""
WORKER = """
import json, os, signal, sys, time
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
found = {name: os.environ.get(name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GREETING")}
folder = os.environ["FAKE_OUT"]
path = os.path.join(folder, os.environ["RANK"] + ".json")
def write():
    json.dump({**found, "arguments": sys.argv[1:], "stopped": bool(stopped)}, open(path, "w"))
write()
while "--wait" in sys.argv and not stopped:
    time.sleep(0.05)
write()
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["launch", *arguments])


def tool(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(stat.S_IRWXU)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / "my runs"
    folder.mkdir()
    (folder / "train it.py").write_text(WORKER)
    return folder / "train it.py"


def sbatch_script(script: Path, *options: str, arguments: tuple[str, ...] = ()) -> str:
    result = run("slurm", str(script), *options, "--dry-run", "--", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_dry_run_prints_a_script_that_bash_takes(script: Path, tmp_path: Path) -> None:
    options = ("--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu", "--account", "a b", "--time", "1-02:00")
    more = (
        "--cpus-per-task",
        "32",
        "--container",
        "my image.sqsh",
        "--mount",
        "/a b:/c",
        "--mount",
        "/d:/d",
        "--requeue",
    )
    text = sbatch_script(script, *options, *more, "--folder", str(tmp_path / "jobs"), arguments=HARD)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for line in ("--nodes=2", "--gpus-per-node=4", "--partition=gpu", "--account='a b'", "--time=1-02:00", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert "#SBATCH --ntasks-per-node=1\n" in text
    assert "#SBATCH --signal=B:USR1@300\n" in text
    assert "'--container-image=my image.sqsh' '--container-mounts=/a b:/c,/d:/d'" in text
    assert shlex.join([str(script), *HARD]) in text
    assert " python -m torch.distributed.run" in text  # the container's own
    assert not (tmp_path / "jobs").exists()


def test_submits_by_sbatch_and_keeps_the_script(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path / "bin", "sbatch", '#!/bin/bash\nbash -n "$1" && echo "Submitted batch job 7"\n')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    result = run("slurm", str(script), "--folder", str(tmp_path / "jobs"), "--name", "first")
    assert result.exit_code == 0, result.output
    [kept] = (tmp_path / "jobs").glob("first-*/job.sbatch")
    assert result.stdout == f"Submitted batch job 7: {kept}\n"
    assert f"#SBATCH --output={shlex.quote(str(kept.parent / '%j.log'))}\n" in kept.read_text()


def test_without_slurm_it_says_what_to_do(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("slurm", str(script), "--folder", str(tmp_path / "jobs"))
    assert result.exit_code == 2
    assert "--dry-run" in result.stderr
    assert not (tmp_path / "jobs").exists()


def test_a_refusal_of_sbatch_is_passed_on(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path / "bin", "sbatch", '#!/bin/bash\necho "invalid partition" >&2; exit 1\n')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    result = run("slurm", str(script), "--folder", str(tmp_path / "jobs"))
    assert result.exit_code == 2
    assert "invalid partition" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("{folder}/nowhere.py",), "expected a recipe (.yaml) or a Python file that is there"),
        (("{folder}/nowhere.yaml",), "expected a recipe (.yaml) or a Python file that is there"),
        (("{script}", "--nodes", "0"), "--nodes is 0"),
        (("{script}", "--env", "2X=1"), "expected NAME=VALUE"),
        (("{script}", "--env", "X"), "expected NAME=VALUE"),
        (("{script}", "--time", "soon"), "expected minutes"),
        (("{script}", "--mount", "/a:/b"), "give --container too"),
        (("{script}", "--stop-before", "5"), "expected more than 15 seconds"),
        (("{script}", "--name", "a/b"), "without a slash"),
        (("{script}", "--partition", "a\n#SBATCH --exclusive"), "line break"),
    ],
)
def test_wrong_input_is_one_sentence(script: Path, arguments: tuple[str, ...], expected: str) -> None:
    filled = [argument.format(folder=script.parent, script=script) for argument in arguments]
    result = run("slurm", *filled, "--dry-run")
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_local_takes_the_same_scripts_only(tmp_path: Path) -> None:
    result = run("local", str(tmp_path / "recipe.txt"))
    assert result.exit_code == 2
    assert "expected a recipe (.yaml) or a Python file that is there" in result.stderr


def test_a_recipe_is_trained_by_the_command(tmp_path: Path) -> None:
    """And read before it is queued: an override that there is not is no matter for the night."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: org/name}\ndata: {kind: mock, vocab_size: 9}\n")
    told = run("slurm", str(recipe), "--nodes", "2", "--dry-run", "--", "--optimizer.lr=1e-3")
    assert told.exit_code == 0, told.output
    assert f"    -m automodel_accel train {recipe} --optimizer.lr=1e-3 &\n" in told.stdout
    wrong = run("slurm", str(recipe), "--dry-run", "--", "--optimizer.lrr=1")
    assert wrong.exit_code == 2
    assert "Did you mean 'lr'?" in wrong.stderr
