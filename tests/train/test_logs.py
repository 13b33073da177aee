"""Rows, lines and trackers."""

import errno
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from automodel_accel.train import logs
from automodel_accel.train.logs import Jsonl, Logging, Logs, training_line, validation_line

ROW: dict[str, Any] = {
    "step": 3,
    "epoch": 0,
    "loss": 1.23456,
    "grad_norm": 0.5,
    "lr": 2e-5,
    "mem": 1.5,
    "tps": 1000.0,
    "tps_per_gpu": 500.0,
    "num_label_tokens": 77,
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines() -> None:
    """The first is the line that NeMo Automodel prints, for parsers of logs."""
    line = (
        "step 3 | epoch 0 | loss 1.2346 | grad_norm 0.5000 | lr 2.00e-05 | mem 1.50 GiB | tps 1000.00(500.00/gpu) | "
        "num_label_tokens 77"
    )
    assert training_line(ROW) == line
    assert training_line(ROW | {"mfu": 0.4321}) == line + " | mfu 43.2%"
    row = {"name": "default", "step": 3, "epoch": 0, "val_loss": 2.0, "lr": 1e-4, "num_label_tokens": 5}
    assert (
        validation_line(row)
        == '[val] name "default" | step 3 | epoch 0 | loss 2.0000 | lr 1.00e-04 | num_label_tokens 5'
    )


def test_rows_that_are_not_finite_are_json_too(tmp_path: Path) -> None:
    file = Jsonl(tmp_path / "a.jsonl")
    file.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert rows(tmp_path / "a.jsonl") == [{"step": 1, "loss": "nan", "grad_norm": "inf"}]


def test_a_run_that_goes_on_takes_its_steps_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    file = Jsonl(path)
    for step in range(1, 6):
        file.write({"step": step})
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while it wrote
    file = Jsonl(path, until=3)
    file.write({"step": 4, "again": True})
    assert rows(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]


class FullDisk:
    """Takes the first bytes of what is written, and says that the disk is full."""

    def __init__(self) -> None:
        self.is_full = False

    def open(self, path: Path, mode: str) -> Any:
        disk, file = self, open(path, mode)  # noqa: SIM115
        write = file.write

        class Stuck(io.BufferedIOBase):
            def __enter__(self) -> Any:
                return file if not disk.is_full else self

            def __exit__(self, *error: object) -> None:
                file.close()

            def truncate(self, size: int | None = None) -> int:
                return file.truncate(size)

            def write(self, data: Any) -> int:
                write(data[:5])
                file.flush()
                raise OSError(errno.ENOSPC, "No space left on device")

        return Stuck()


def test_a_full_disk_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, path = FullDisk(), tmp_path / "a.jsonl"
    monkeypatch.setattr(logs, "open", disk.open, raising=False)
    file = Jsonl(path)
    file.write({"step": 1})
    disk.is_full = True
    with caplog.at_level(logging.WARNING, "automodel_accel"):
        file.write({"step": 2})
        file.write({"step": 3})
    assert [record.message.count("No space left on device") for record in caplog.records] == [1]
    with pytest.raises(OSError, match="2 rows could not be written"):
        file.close()
    disk.is_full = False
    file.write({"step": 4})
    assert rows(path) == [{"step": step} for step in (1, 2, 3, 4)]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = Logging(trackers=("tensorboard",), project="tried")
    made = Logs(tmp_path, settings, {"optimizer": {"lr": 1e-4}, "name": None})
    made.training(ROW)
    made.validation({"name": "held_out", "step": 3, "val_loss": 2.5})
    made.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "tried"))
    events.Reload()
    assert [(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")] == [(3, 1.2346)]
    assert [event.value for event in events.Scalars("held_out/val_loss")] == [2.5]
    assert rows(tmp_path / "training.jsonl") == [ROW]
    assert rows(tmp_path / "validation.jsonl") == [{"name": "held_out", "step": 3, "val_loss": 2.5}]


def test_wandb_without_a_key_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert not logs._knows_wandb()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert logs._knows_wandb()
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "online")
    assert logs._knows_wandb()


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every is 0"):
        Logging(every=0)
    with pytest.raises(ValueError, match="settings of wandb, which trackers does not name"):
        Logging(settings={"wandb": {}})
    absent = [name for name in ("wandb", "mlflow") if not logs.this_machine().has(name)]
    for name in absent:
        with pytest.raises(ValueError, match=f"{name}, which is not installed; pip install {name}"):
            Logs(tmp_path, Logging(trackers=(name,)), {})  # type: ignore[arg-type]
