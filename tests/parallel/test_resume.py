"""A checkpoint of FSDP2 over tensor parallel goes on in one process; what is exported is what plain transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from automodel_accel.checkpoint import Checkpoints
from tests.launching import launch
from tests.parallel.resume import SAVED, STEPS, build, train


@pytest.mark.slow
def test_four_ranks_then_one(tmp_path: Path) -> None:
    launch("tests.parallel.resume", tmp_path, 4)
    expected = json.loads((tmp_path / "losses.json").read_text())
    model, optimizer = build()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.load(model=model, optimizer=optimizer)
    assert restored is not None
    assert restored.step == SAVED
    assert train(model, optimizer, range(SAVED, STEPS)) == pytest.approx(expected[SAVED:], rel=1e-5)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    own = model.state_dict()
    assert exported.keys() == own.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, own[name], rtol=1e-3, atol=1e-4)  # AdamW divides by roots of small squares
