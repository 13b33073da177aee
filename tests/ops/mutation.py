"""Mutants: copies of a source file with one plausible mistake, each of which the checks of its operation must catch.

A mutant of an implementation (`fused.py`, `eager.py`) takes the place of the real module behind the operation's own host code;
a mutant of the host code (`__init__.py`) is handed to the check instead of the real package. It is caught only by an
AssertionError: a mutant that crashes proves nothing about the check.
"""

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from automodel_accel.kernels import registration
from automodel_accel.kernels.contract import implementation_module
from automodel_accel.kernels.registration import Definition

_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake.

    Attributes:
        file: Source file, relative to `kernels/`, such as "rms_norm/fused.py".
        old: Text that stands exactly once in it.
        new: What the mistake writes instead.
        why: The mistake in words; names the test.
    """

    file: str
    old: str
    new: str
    why: str


def check_caught(mutant: Mutant, check: Callable[[ModuleType], object], folder: Path) -> None:
    """Run `check` on the package with the mutant in it; it must raise an AssertionError.

    Args:
        mutant: The mistake.
        check: Takes the operation's package (the real one, or a mutated `__init__.py`) and asserts that it is right.
        folder: Where the mutated copy is written.
    """
    caught = False
    with mutated(mutant, folder) as package:
        try:
            check(package)
        except AssertionError:
            caught = True
    if not caught:
        pytest.fail(f"survived: {mutant.why} ({mutant.file}: {mutant.old!r} -> {mutant.new!r})")


@contextmanager
def mutated(mutant: Mutant, folder: Path) -> Iterator[ModuleType]:
    """Put the mutant in force, and yield the operation's package that computes with it."""
    operation, _, file = mutant.file.partition("/")
    package = importlib.import_module(f"automodel_accel.kernels.{operation}")
    path = Path(str(package.__file__)).with_name(file)
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.old!r} stands {source.count(mutant.old)} times in {mutant.file}"
    copy = folder / f"mutant_{next(_serial)}_{operation}_{path.stem.strip('_')}.py"
    copy.write_text(source.replace(mutant.old, mutant.new))
    if file == "__init__.py":
        with _registered_apart():
            module = _load(copy)
        yield module
        return
    real = f"{package.__name__}.{path.stem}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, real, _load(copy))
        implementation_module.cache_clear()
        yield package
    implementation_module.cache_clear()


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _registered_apart() -> Iterator[None]:
    """A mutated `__init__.py` registers its operations under names of its own: the real ones stay as they are."""
    real, prefix = registration.register, f"mutant_{next(_serial)}_"

    def register(name: str, definition: Definition) -> Callable[..., tuple[torch.Tensor, ...]]:
        return real(prefix + name, definition)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "register", register)
        yield
