"""Runs a module of the tests in several processes, as a user does: by torchrun."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def launch(module: str, folder: Path, processes: int = 2) -> None:
    """`torchrun --nproc_per_node PROCESSES -m MODULE FOLDER`, which must end well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = ["-m", module, str(folder)]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]


def of_each(module: str, folder: Path, processes: int = 2) -> list[Any]:
    """`launch`, and what each process left in FOLDER/<its rank>.json."""
    launch(module, folder, processes)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
