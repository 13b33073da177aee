"""Damage, full disks, other models: what is refused, in which words, and that the checkpoint before is still there."""

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from automodel_accel.checkpoint import CheckpointError, Checkpoints, DamagedError, files
from automodel_accel.checkpoint.catalog import entries, read_entry
from tests.checkpoint.forks import Forks
from tests.checkpoint.runs import Run


def saved(folder: Path, steps: int = 2, **settings: Any) -> tuple[Run, Checkpoints, list[str]]:
    """A run with a checkpoint after each step, and the digest at each."""
    run, checkpoints = Run("plain", dropout=0.1), Checkpoints(folder, signals=(), **settings)
    digests = []
    for number in range(1, steps + 1):
        run.step()
        checkpoints.save(number, metrics={"loss": float(number)}, **run.state())
        digests.append(run.digest())
    checkpoints.wait()
    return run, checkpoints, digests


def flip(path: Path, at: int) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 4
    path.write_bytes(data)


HARM: dict[str, Callable[[Path], None]] = {
    "a bit of the last byte": lambda path: flip(path, -1),
    "a bit in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "missing": Path.unlink,
}
FILES = ("model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors", "rank-00000.json")


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", [*FILES, "state.json", "checkpoint.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, harm: str) -> None:
    _, checkpoints, digests = saved(tmp_path)
    last = checkpoints.latest()
    assert last is not None
    HARM[harm](last / name)
    run = Run("plain", dropout=0.1)
    with pytest.warns(RuntimeWarning, match=f"passed over(.|\n)*{re.escape(str(last / name))}(.|\n)*step 1"):
        restored = checkpoints.load(**run.state())
    assert restored is not None
    assert (restored.step, run.digest()) == (1, digests[0])
    if name != "checkpoint.json":
        with pytest.raises(DamagedError, match=re.escape(str(last / name))):
            checkpoints.load(step=2, **run.state())


def test_when_all_are_damaged_it_says_so(tmp_path: Path) -> None:
    run, checkpoints, _ = saved(tmp_path)
    for entry in entries(tmp_path)[0]:
        flip(entry.folder / "state.json", 9)
    with pytest.raises(DamagedError, match=r"no checkpoint that is whole(.|\n)*step-00000002(.|\n)*step-00000001"):
        checkpoints.load(**run.state())


def test_after_falling_back_the_step_is_saved_anew_and_is_the_last(tmp_path: Path) -> None:
    run, checkpoints, digests = saved(tmp_path)
    flip(tmp_path / "step-00000002" / "state.json", 9)
    with pytest.warns(RuntimeWarning, match="passed over"):
        checkpoints.load(**run.state())
    run.step()
    checkpoints.save(2, **run.state())
    checkpoints.wait()
    assert checkpoints.latest() == tmp_path / "step-00000002-2"
    again = Run("plain")
    assert checkpoints.load(**again.state()) is not None
    assert again.digest() == digests[1]


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none", signals=())
    assert checkpoints.load(model=nn.Linear(2, 2)) is None
    assert checkpoints.latest() is None
    with pytest.raises(ValueError, match="no complete checkpoint of step 7, but of none"):
        checkpoints.load(model=nn.Linear(2, 2), step=7)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("writes", [0, 1, 3])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, writes: int) -> None:
    run, checkpoints, digests = saved(tmp_path, asynchronous=asynchronous)
    write_all, calls = files.write_all, []

    def full(file: Any, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_all(file, data)

    monkeypatch.setattr(files, "write_all", full)
    run.step()
    with pytest.raises(CheckpointError, match=r"no space left on the disk after \d+ bytes"), checkpoints:
        checkpoints.save(3, **run.state())
    monkeypatch.undo()
    checkpoints = Checkpoints(tmp_path, signals=(), asynchronous=asynchronous)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000001", "step-00000002"]
    checkpoints.load(**run.state())
    assert run.digest() == digests[1]
    run.step()
    checkpoints.save(3, **run.state())  # there is space again
    checkpoints.wait()
    assert checkpoints.latest() == tmp_path / "step-00000003"


def test_a_rank_whose_disk_is_full_fails_all(forks: Forks, tmp_path: Path) -> None:
    first, second = forks.run("limited_file_size", tmp_path, 2)
    assert first == "CheckpointError: rank 1: " + second.removeprefix("CheckpointError: ")
    assert "could not be written: File too large; older checkpoints are as they were." in second
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["LATEST", "step-00000001"]
    entry = read_entry(tmp_path / "checkpoints" / "step-00000001")
    entry.check(sorted(entry.files))


def other(change: Callable[[Any], None]) -> nn.Module:
    """The network, changed."""
    model = Run("plain").model
    change(model)
    return model


OTHERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "another size": (
        lambda model: setattr(model, "down", nn.Linear(10, 9)),
        r"down\.weight is \[9, 10\], the checkpoint's \[7, 10\]",
    ),
    "fewer": (lambda model: delattr(model, "norm"), r"2 names of the checkpoint are not in the model \(norm\.weight"),
    "more": (lambda model: setattr(model, "gate", nn.Linear(2, 2)), r"2 names of the model are not .*gate\.weight"),
    "another dtype": (lambda model: model.bfloat16(), r"is torch\.bfloat16, the checkpoint's torch\.float32"),
    "untied": (
        lambda model: setattr(model, "head", nn.Linear(7, 13, bias=False)),
        r"1 names of the model are not in the checkpoint \(head\.weight\)",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    _, checkpoints, _ = saved(tmp_path)
    change, words = OTHERS[name]
    model = other(change)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"of another model: .*{words}"):
        checkpoints.load(model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    run, checkpoints, _ = saved(tmp_path)
    with pytest.raises(ValueError, match=r"optimizers \['AdamW'\]; these are \['SGD'\]"):
        checkpoints.load(model=run.model, optimizer=torch.optim.SGD(run.model.parameters()))
    with pytest.raises(ValueError, match=r"groups of \[7\] parameters, the checkpoint's of \[2, 4\]"):
        checkpoints.load(model=run.model, optimizer=torch.optim.AdamW(run.model.parameters()))
    stranger = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="not the model's"):
        checkpoints.save(9, model=run.model, optimizer=stranger)


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, signals=())
    with pytest.raises(ValueError, match=r"extra\['f'\]\[1\] is a function"):
        checkpoints.save(1, model=nn.Linear(2, 2), extra={"f": (1, flip)})
    with pytest.raises(ValueError, match=r"weight is torch\.complex64"):
        checkpoints.save(1, model=nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="save the steps"):
        checkpoints.save(-1, model=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="keep_last is 0"):
        Checkpoints(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="there is no 'SIGFOO'"):
        Checkpoints(tmp_path, signals=("SIGFOO",))


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    saved(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {"", ".json", ".safetensors"}
