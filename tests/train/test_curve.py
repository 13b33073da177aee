"""The picture of a run."""

from pathlib import Path

import pytest

from automodel_accel.train.curve import _means, draw
from automodel_accel.train.logs import Jsonl


def test_draws_training_and_validation(tmp_path: Path) -> None:
    training, validation = Jsonl(tmp_path / "training.jsonl"), Jsonl(tmp_path / "validation.jsonl")
    for step in range(1, 50):
        training.write({"step": step, "loss": float("nan") if step == 7 else 10.0 / step})
    validation.write({"step": 49, "name": "held_out", "val_loss": 0.4})
    path = draw(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_means_end_at_their_last_step() -> None:
    assert _means([1, 2, 3, 4, 5], [1.0, 3.0, 5.0, 7.0, 9.0], 2) == ([2, 4], [2.0, 6.0])


def test_no_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no step with a loss"):
        draw(tmp_path)
