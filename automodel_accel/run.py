"""Run a training script unchanged; every Hugging Face model that it builds is accelerated.

    python -m automodel_accel.run train.py --learning_rate 1e-5
    accelerate launch -m automodel_accel.run train.py --learning_rate 1e-5

The script runs as under plain python: arguments, `__main__`, working folder, output, tracebacks and exit code are its own.
Two things differ. torch is imported before the script: what torch reads from the environment when it is imported
(OMP_NUM_THREADS) must be set outside of the script. Processes that the script itself spawns are plain python.
"""

import builtins
import importlib.machinery
import json
import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn

import torch
import yaml

from automodel_accel import building
from automodel_accel.config import FP8, OTHERS, AccelConfig
from automodel_accel.kernels.contract import AUTO, unknown_name
from automodel_accel.report import Report

PREFIX = "--accel."
SETTINGS = tuple(field.name for field in fields(AccelConfig))
FILES = ("config", "report")
_PACKAGE = os.path.dirname(__file__)
HELP = f"""\
usage: python -m automodel_accel.run [--accel.NAME=VALUE ...] SCRIPT [arguments of the script ...]
       python -m automodel_accel.run [--accel.NAME=VALUE ...] -m MODULE [arguments of the module ...]
       accelerate launch [its options ...] -m automodel_accel.run SCRIPT [arguments of the script ...]

Runs a training script unchanged; every Hugging Face model that it builds is accelerated when its training begins.
One line for each model goes to stderr. The options below may stand before or after the script; all other arguments,
and all that follow a lone --, are the script's.

  --accel.NAME=VALUE        a setting of automodel_accel.AccelConfig, for all models:
                            {", ".join(SETTINGS[:6])},
                            {", ".join(SETTINGS[6:])}
  --accel.config=FILE.yaml  settings from a file; single ones win over it
  --accel.report=FILE.json  what was swapped, refused and counted in each model; written when the script ends

examples:
  python -m automodel_accel.run train.py --model_name_or_path Qwen/Qwen3-0.6B
  python -m automodel_accel.run --accel.recompute=selective --accel.report=report.json train.py
  accelerate launch --num_processes 8 -m automodel_accel.run train.py --accel.mlp=false
"""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line, read.

    Attributes:
        target: The script's path, or the module's name.
        is_module: Which of the two it is.
        arguments: The script's own.
        settings: For each model.
        report: Where to write the reports.
    """

    target: str
    is_module: bool
    arguments: list[str]
    settings: AccelConfig
    report: Path | None


def main() -> None:
    """Run the script that the command line names, and exit as it does."""
    try:
        command = parse(sys.argv[1:])
    except ValueError as error:
        _stop(f"automodel_accel.run: error: {error}")
    if command is None:
        sys.stdout.write(HELP)
        return
    if not command.is_module:
        _check_readable(command.target)
    try:
        with _lines_on_stderr(), building.noticed(command.settings) as built, _written_at_end(command, built.reports):
            if command.is_module:
                _run_module(command)
            else:
                _run_script(command)
            if not built.reports:
                building.logger.warning(
                    "no Hugging Face model was trained or called in this process; nothing was swapped."
                )
    finally:
        sys.excepthook = _without_our_frames(sys.excepthook)  # the script may have set its own


def parse(words: list[str]) -> Command | None:
    """Read a command line, without the program's name; None where it asks for help.

    Raises:
        ValueError: an unknown or malformed option of ours, or no script.
    """
    words = list(words)
    ours = []
    while words and words[0].startswith(PREFIX):
        ours.append(words.pop(0))
    if words and words[0] in ("-h", "--help"):
        return None
    is_module = bool(words) and words[0] == "-m"
    if is_module:
        words.pop(0)
    if not words:
        raise ValueError(
            f"no {'module' if is_module else 'script'} was given; see python -m automodel_accel.run --help."
        )
    target = words.pop(0)
    if target.startswith("-"):
        raise ValueError(f"unknown option {target!r} before the script; ours begin with {PREFIX}, see --help.")
    end = words.index("--") if "--" in words else len(words)
    ours += [word for word in words[:end] if word.startswith(PREFIX)]
    arguments = [word for word in words[:end] if not word.startswith(PREFIX)] + words[end:]
    options = dict(map(_option, ours))
    config, report = options.pop("config", None), options.pop("report", None)
    return Command(target, is_module, arguments, _settings(config, options), _report_path(report))


def _option(word: str) -> tuple[str, str]:
    name, equals, text = word.removeprefix(PREFIX).partition("=")
    known = [f"{PREFIX}{other}" for other in (*SETTINGS, *FILES)]
    if PREFIX + name not in known:
        raise ValueError(unknown_name("option", PREFIX + name, known))
    if not equals or not text:
        raise ValueError(f"{PREFIX}{name}: expected {PREFIX}{name}=VALUE, without blanks.")
    return name, text


def _settings(config: str | None, options: Mapping[str, str]) -> AccelConfig:
    settings = AccelConfig() if config is None else _read_config(config)
    settings = AccelConfig.build(settings, **{name: _value(name, text) for name, text in options.items()})
    _check_named(settings)
    return settings


def _value(name: str, text: str) -> Any:
    if name == "fp8_layers":  # patterns, which YAML would take for anchors
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{PREFIX}{name}={text}: not a YAML value ({error}).") from error


def _read_config(name: str) -> AccelConfig:
    where = f"{PREFIX}config={name}"
    try:
        read = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(read, dict) or not all(isinstance(key, str) for key in read):
        raise ValueError(f"{where}: expected a mapping of settings, such as `mlp: false`; got {type(read).__name__}.")
    try:
        return AccelConfig.build(read)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_named(settings: AccelConfig) -> None:
    """Before the script runs for an hour. Imports transformers, so only where an implementation is named."""
    fusions = [name for name in SETTINGS if name not in OTHERS]
    named = {getattr(settings, name) for name in (*fusions, "implementation", "fp8")} - {AUTO, True, False, *FP8}
    if not named:
        return
    from automodel_accel.plan import all_patches, check_implementations

    check_implementations(settings, all_patches())


def _report_path(name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name).absolute()  # the script may change folders
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"{PREFIX}report={name}: expected a file in a folder that exists.")
    return path


def _check_readable(path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        full = os.path.abspath(path)
        _stop(f"{sys.executable}: can't open file {full!r}: [Errno {error.errno}] {error.strerror}")


def _stop(message: str) -> NoReturn:
    sys.stderr.write(message + "\n")
    sys.exit(2)


class _Script(importlib.machinery.SourceFileLoader):
    """Loads a script as python does: compiled anew, with nothing cached beside it."""

    def path_stats(self, path: str | bytes | os.PathLike[str]) -> Mapping[str, Any]:
        raise OSError("a script is not cached")


def _run_script(command: Command) -> None:
    main_module, full = _new_main(), os.path.abspath(command.target)
    loader = _Script("__main__", full)
    vars(main_module).update(__file__=full, __loader__=loader, __cached__=None)
    sys.argv[:] = [command.target, *command.arguments]
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):  # safe_path: Python 3.11
        sys.path[0] = os.path.dirname(os.path.realpath(command.target))
    loader.exec_module(main_module)


def _run_module(command: Command) -> None:
    _new_main()
    sys.argv[1:] = command.arguments
    runpy._run_module_as_main(command.target)  # type: ignore[attr-defined]  # what python -m calls


def _new_main() -> ModuleType:
    """An empty `__main__` in place of this one; it stays to the end of the process, for what runs at exit."""
    main_module = ModuleType("__main__")
    main_module.__builtins__ = builtins  # type: ignore[attr-defined]
    sys.modules["__main__"] = main_module
    return main_module


@contextmanager
def _lines_on_stderr() -> Iterator[None]:
    """Our own lines go to stderr whatever the script does with its logging, from the first process only."""
    logger = logging.getLogger("automodel_accel")
    before = logger.level, logger.propagate
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("automodel_accel: %(message)s"))
    handler.addFilter(lambda record: _is_first_process())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


@contextmanager
def _written_at_end(command: Command, reports: list[Report]) -> Iterator[None]:
    try:
        yield
    finally:
        if command.report is not None and _is_first_process():
            text = json.dumps([done.to_dict() for done in reports], indent=2)
            command.report.write_text(text + "\n", encoding="utf-8")


def _is_first_process() -> bool:
    """Of all; of those on its machine where the process group does not exist yet or any more."""
    if not torch.distributed.is_available():
        return True
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return torch.distributed.get_node_local_rank(fallback_rank=0) == 0


Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def _without_our_frames(hook: Hook) -> Hook:
    """A hook that is shown the tracebacks which plain python would show."""

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> object:
        error.__traceback__ = _from_script(traceback)
        for one in _chain(error):
            _skip_wrappers(one.__traceback__)
        return hook(kind, error, error.__traceback__)

    return show


def _from_script(traceback: TracebackType | None) -> TracebackType | None:
    """Without what stands before the script's first frame."""
    rest = traceback
    while traceback is not None:
        if _file_of(traceback) == __file__:
            rest = traceback.tb_next
        traceback = traceback.tb_next
    while rest is not None and _file_of(rest).startswith("<frozen importlib"):
        rest = rest.tb_next
    return rest


def _skip_wrappers(traceback: TracebackType | None) -> None:
    """Take out frames that only pass a call on: building's, where the next frame is not ours."""
    while traceback is not None and (later := traceback.tb_next) is not None:
        after = later.tb_next
        if _file_of(later) == building.__file__ and after is not None and not _file_of(after).startswith(_PACKAGE):
            traceback.tb_next = after
        else:
            traceback = later


def _chain(error: BaseException) -> list[BaseException]:
    """The error, its causes and contexts."""
    found: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and one not in found:
            found.append(one)
            left += [one.__cause__, one.__context__]
    return found


def _file_of(traceback: TracebackType) -> str:
    return traceback.tb_frame.f_code.co_filename


if __name__ == "__main__":
    main()
