"""A script that looks at everything a script can see of how it is run, and ends in one of many ways."""

from __future__ import annotations

import argparse
import atexit
import builtins
import json
import multiprocessing
import pickle
import signal
import sys
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Settings:
    name: str
    number: int | None = None


def square(number: int) -> int:
    return number**2


def surroundings(rest: list[str]) -> dict[str, object]:
    main_module = sys.modules["__main__"]
    spec = main_module.__spec__
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        squared = pool.map(square, [3])
    return {
        "argv": [*sys.argv[1:], *rest],
        "program": sys.argv[0],
        "file": __file__,
        "name": __name__,
        "package": __package__,
        "spec": spec and spec.name,
        "cached": __cached__ and Path(__cached__).name,
        "path": sys.path,
        "folder": str(Path.cwd()),
        "is_main": vars(main_module) is globals(),
        "builtins": __builtins__ is builtins,
        "hints": {name: str(hint) for name, hint in typing.get_type_hints(Settings).items()},
        "pickled": pickle.loads(pickle.dumps(Settings("a"))) == Settings("a"),
        "class": Settings.__module__,
        "squared": squared,
    }


def fail() -> None:
    try:
        raise KeyError("first")
    except KeyError as error:
        raise RuntimeError("second") from error


def show_shortly(kind: type[BaseException], error: BaseException, traceback: typing.Any) -> None:
    frames = []
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    sys.stderr.write(f"my own hook: {kind.__name__}: {error} in {frames}\n")


def build_optimizer_of_nothing() -> None:
    import torch

    torch.optim.AdamW([])


def end(how: str) -> None:
    if how == "code":
        sys.exit(3)
    elif how == "text":
        sys.exit("that is enough")
    elif how == "error":
        fail()
    elif how == "hook":
        sys.excepthook = show_shortly
        fail()
    elif how == "interrupt":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
        signal.raise_signal(signal.SIGINT)
    elif how == "optimizer":
        build_optimizer_of_nothing()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--end", default="well")
    arguments, others = parser.parse_known_args()
    atexit.register(lambda: sys.stdout.write(f"at exit, in {pickle.loads(pickle.dumps(Settings)).__module__}\n"))
    warnings.warn("mind the gap", stacklevel=1)
    sys.stdout.write(json.dumps(surroundings(others), indent=1) + "\n")
    end(arguments.end)
