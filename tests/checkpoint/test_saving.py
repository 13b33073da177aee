"""What is kept, when it is taken, what every optimizer needs, and how a signal ends a run."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from automodel_accel.checkpoint import Checkpoints, saving
from automodel_accel.checkpoint.catalog import entries
from automodel_accel.checkpoint.plain import decode, encode
from tests.checkpoint.forks import Forks
from tests.checkpoint.runs import Run

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"foreach": True},
    "Adam": {"fused": True, "amsgrad": True},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adagrad": {},
    "Adadelta": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "SGD": {"momentum": 0.9},
    "Rprop": {},
    "ASGD": {},
    "Adafactor": {},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_by_bit(tmp_path: Path, kind: str) -> None:
    settings = OPTIMIZERS[kind]
    run, checkpoints = Run("plain", 0.1, kind, **settings), Checkpoints(tmp_path, signals=())
    run.step()
    checkpoints.save(1, **run.state())
    wanted = [(run.step(), run.digest()) for _ in range(2)]
    again = Run("plain", 0.1, kind, **settings)
    assert checkpoints.load(**again.state()) is not None
    assert [(again.step(), again.digest()) for _ in range(2)] == wanted


def test_states_keep_their_dtype(tmp_path: Path) -> None:
    """torch's load_state_dict casts float32 states of bfloat16 parameters to bfloat16."""
    model = nn.Linear(3, 3, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    optimizer.state[model.weight]["momentum_buffer"] = torch.randn(3, 3)
    checkpoints = Checkpoints(tmp_path, signals=())
    checkpoints.save(0, model=model, optimizer=optimizer)
    other = nn.Linear(3, 3, dtype=torch.bfloat16)
    fresh = torch.optim.SGD(other.parameters(), momentum=0.9)
    checkpoints.load(model=other, optimizer=fresh)
    assert torch.equal(fresh.state[other.weight]["momentum_buffer"], optimizer.state[model.weight]["momentum_buffer"])


def test_before_the_first_step_nothing_is_stepped(tmp_path: Path) -> None:
    run, checkpoints = Run("plain"), Checkpoints(tmp_path, signals=())
    checkpoints.save(0, **run.state())
    assert not run.optimizer.state
    again = Run("plain")
    again.step()
    checkpoints.load(**again.state())
    assert not again.optimizer.state


def test_later_steps_do_not_show_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread begins to write only after two more steps."""
    write = saving.write_safetensors

    def late(*arguments: Any) -> Any:
        while len(losses) < 2:
            time.sleep(0.01)
        return write(*arguments)

    losses: list[float] = []
    monkeypatch.setattr(saving, "write_safetensors", late)
    run, checkpoints = Run("plain", 0.1), Checkpoints(tmp_path, signals=())
    run.step()
    digest = run.digest()
    checkpoints.save(1, **run.state())
    losses += [run.step(), run.step()]
    again = Run("plain", 0.1)
    checkpoints.load(**again.state())
    assert again.digest() == digest
    assert [again.step(), again.step()] == losses


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1, metric="accuracy", greater_is_better=True, signals=())
    model = nn.Linear(2, 2)
    for step, accuracy in enumerate([0.1, 0.9, float("nan"), 0.3, 0.2]):
        checkpoints.save(step, model=model, metrics={"accuracy": accuracy})
    checkpoints.close()
    assert [entry.step for entry in entries(tmp_path)[0]] == [4, 3, 1]
    assert checkpoints.best() == tmp_path / "step-00000001"
    assert (tmp_path / "LATEST").read_text() == "step-00000004\n"


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    for name in ("step-00000009.partial", "step-00000003-2.partial", "mine.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with Checkpoints(tmp_path, signals=()) as checkpoints:
        checkpoints.save(1, model=nn.Linear(2, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "mine.partial", "step-00000001"]


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_ends_all_ranks_at_the_same_step(forks: Forks, tmp_path: Path, world: int) -> None:
    """One rank hears it; all save the same step and end with code 0."""
    pids = forks.start("train_until_stopped", tmp_path, world, layout="ddp" if world > 1 else "plain")
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    signal_to = pids[-1]
    os.kill(signal_to, signal.SIGTERM)
    assert forks.wait(pids) == [0] * world
    found = entries(tmp_path / "checkpoints")[0]
    said = {(tmp_path / f"{rank}.json").read_text() for rank in range(world)}
    assert said == {str(found[0].step)}


def test_plain_values_come_back_exactly() -> None:
    import numpy as np

    value = {
        **{
            "text": "\u00e9",
            "none": None,
            "large": 2**200,
            "third": 1 / 3,
            "infinite": float("-inf"),
            "bytes": b"\x00\xff",
        },
        **{3: (1, [2.0, (True,)]), ("a", 1): {4, 5}, "@": "marked", "dtype": torch.bfloat16},
    }
    assert decode(encode(value, "value")) == value
    for tensor in (torch.randn(2, 3, dtype=torch.bfloat16), torch.tensor(True), torch.empty(0, 2), torch.tensor(1.5)):
        back = decode(encode(tensor, "tensor"))
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)
    array = np.arange(6, dtype=np.uint32).reshape(2, 3)
    assert np.array_equal(decode(encode(array, "array")), array)


def test_the_disk_has_every_file_before_the_name_and_the_name_before_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power failure would show, and kill -9 does not: the order of flushes and renames."""
    events: list[str] = []
    flush, rename = os.fsync, os.replace

    def fsync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        flush(handle)

    def replace(source: Path, target: Path) -> None:
        events.append(f"-> {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with Checkpoints(tmp_path / "root", signals=()) as checkpoints:
        checkpoints.save(1, model=nn.Linear(2, 2))
    named, moved = events.index("-> step-00000001"), events.index("-> LATEST")
    files = {path.name for path in (tmp_path / "root" / "step-00000001").iterdir()}
    assert files < set(events[:named])
    assert events[named - 1] == "step-00000001.partial"
    assert events[named + 1] == "root"
    assert events[named + 2 : moved] == ["LATEST.partial"]
    assert events[moved + 1 :] == ["root"]
