"""The vision-language example, a few steps of it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from automodel_accel.demo import resolve

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def vlm_vqa(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import vlm_vqa

    return vlm_vqa


def test_a_few_steps_lower_the_loss(vlm_vqa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("easy_vqa")
    threads = torch.get_num_threads()
    options = ["--steps", "5", "--batch-size", "16", "--test-questions", "16", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["vlm_vqa.py", *options, "--threads", str(threads), "--output", str(tmp_path)])
    assert vlm_vqa.main() == 0
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["last_loss"] < figures["first_loss"]
    assert 0 <= figures["accuracy"] <= 1
    said = capsys.readouterr().out
    assert "vision_tower" in said
    assert f"test accuracy {figures['accuracy']:.3f}" in said


def test_a_trained_model_is_tested_alone(vlm_vqa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("easy_vqa")
    model = resolve("demo:tiny-llava")
    options = ["--model", str(model), "--test-questions", "16", "--workers", "0", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["vlm_vqa.py", *options, "--threads", str(torch.get_num_threads())])
    assert vlm_vqa.main() == 0
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures.keys() == {"accuracy"}
    assert f"test accuracy {figures['accuracy']:.3f}" in capsys.readouterr().out


def test_without_its_data_it_says_what_to_install(
    vlm_vqa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    monkeypatch.setattr(sys, "argv", ["vlm_vqa.py", "--output", str(tmp_path)])
    assert vlm_vqa.main() == 2
    assert "pip install easy-vqa --no-deps" in capsys.readouterr().err
