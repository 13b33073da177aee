"""Processes that start in milliseconds: forks of one warm process, which has imported torch and started nothing.

`Forks` is the handle in the test; this module, run as a script, is the warm process. It reads one JSON request a line and answers with one.
"""

import tests.conftest  # noqa: F401, I001  # the environment of the tests, before anything of ours is imported

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Forks:
    """The warm process, seen from a test."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.forks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, function: str, folder: Path, world: int = 1, **arguments: Any) -> list[int]:
        """Run "function of tests.checkpoint.runs" in each of `world` forks; their process ids."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "store").unlink(missing_ok=True)  # of other ranks, that have gone
        found: list[int] = self._ask(function=function, folder=str(folder), world=world, arguments=arguments)
        return found

    def wait(self, pids: list[int]) -> list[int]:
        """Their exit codes; minus the signal where one ended them."""
        found: list[int] = self._ask(wait=pids)
        return found

    def run(self, function: str, folder: Path, world: int = 1, **arguments: Any) -> list[Any]:
        """What the function returned in each of them."""
        codes = self.wait(self.start(function, folder, world, **arguments))
        logs = "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(world))
        assert codes == [0] * world, f"exit codes {codes}\n{logs}"
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]

    def close(self) -> None:
        """End the warm process."""
        self._server.communicate()


def kill(pids: list[int]) -> None:
    """As `kill -9`."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def serve() -> None:
    """Answer requests until there are no more."""
    runs = importlib.import_module("tests.checkpoint.runs")
    runs.warm()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in request["wait"]]
        else:
            answer = [fork(runs, rank, **request) for rank in range(request["world"])]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def fork(runs: Any, rank: int, function: str, folder: str, world: int, arguments: dict[str, Any]) -> int:
    """One rank; its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open(Path(folder) / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        found = runs.one_rank(getattr(runs, function), rank, world, Path(folder), arguments)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
        code = 0
    finally:
        if code:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
