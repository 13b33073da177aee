"""Every recipe that is shipped is short, and trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from automodel_accel.recipes.recipe import load
from automodel_accel.recipes.running import run_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
ALONE = [path for path in RECIPES if load(path).mesh.tensor == 1]
TOGETHER = [path for path in RECIPES if path not in ALONE]
SMALL = ["--training.steps=2", "--training.global_batch_size=2", "--batching.batch_size=1", "--validation=null"]
SHORT = ["--batching.seq_length=48", "--schedule.warmup=0", "--schedule.decay=0"]


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def test_what_is_promised_is_there() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {"smollm2_full", "smollm2_lora", "smollm2_qlora", "smollm2_fp8", "smollm2_packed", "pretrain"}
    assert names >= {"pretrain_fsdp2_tp", "distillation", "vlm_full", "vlm_lora"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_short_and_whole(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 30
    load(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_two_steps(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    length = ["--batching.seq_length=128"] if recipe.has_images else SHORT[:1]
    recipe = load(path, [*SMALL, *length, *SHORT[1:], f"--output={tmp_path / 'run'}"])
    outcome = run_recipe(recipe, recipe.mesh.ranks(), said=lambda text: None)
    assert outcome.is_complete
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    assert all(0 < row["grad_norm"] < float("inf") for row in rows(tmp_path / "run"))
    assert (tmp_path / "run" / "model" / "README.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", TOGETHER, ids=lambda path: path.stem)
def test_two_steps_on_four_processes(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "automodel_accel", "train", str(path), "--nproc-per-node", "4"]
    arguments = [*SMALL, *SHORT, f"--output={tmp_path / 'run'}", "--model.config.num_hidden_layers=2"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
