"""Recipes, run."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from automodel_accel.checkpoint import Checkpoints
from automodel_accel.recipes.recipe import load
from automodel_accel.recipes.running import run_recipe
from automodel_accel.train.loop import Outcome
from tests.recipes.conftest import MakeRecipe

ROOT = Path(__file__).resolve().parent.parent.parent


def run(path: Path, *overrides: str) -> Outcome:
    recipe = load(path, overrides)
    return run_recipe(recipe, recipe.mesh.ranks(), said=lambda text: None)


def rows(folder: Path, file: str = "training.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def command(path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "automodel_accel", "train", str(path), *arguments]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters in the last checkpoint."""
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {name: one for file in sorted(last.glob("model-*.safetensors")) for name, one in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    first, second = trained(one), trained(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for name in ("loss", "grad_norm", "num_label_tokens", "lr"):
        assert [row[name] for row in rows(one)] == [row[name] for row in rows(other)]


def test_leaves_what_one_looks_for(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    outcome = run(make_recipe(training={"validate_every": 3}))
    folder = tmp_path / "run"
    assert outcome.is_complete
    assert {"recipe.yaml", "plan.txt", "report.json", "figures.json", "loss_curve.png", "model", "checkpoints"} <= {
        path.name for path in folder.iterdir()
    }
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(folder, "validation.jsonl")] == [0, 3, 6]
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["validation"]["held_out"] == rows(folder, "validation.jsonl")[-1]["val_loss"]
    assert figures["tokens"] == sum(round(row["tps"] * _seconds(row)) for row in rows(folder))
    assert load(folder / "recipe.yaml") == load(tmp_path / "recipe.yaml")
    assert json.loads((folder / "report.json").read_text())["calls"]["loss"] > 0
    assert all(row["materialised_logits"] == 0 for row in rows(folder))


def _seconds(row: dict[str, Any]) -> float:
    return sum(row[f"seconds_{name}"] for name in ("data", "forward_backward", "optimizer"))


def test_equals_a_plain_loop_of_transformers(make_recipe: MakeRecipe, tmp_path: Path, model_folder: Path) -> None:
    """The same batches, the mean over all label tokens of a step, clipping, AdamW, the schedule; with everything fused."""
    from transformers import AutoModelForCausalLM

    from automodel_accel.data import open_data

    path = make_recipe(validation=None)
    run(path)
    recipe = load(path)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    factors = recipe.schedule.factors(6)
    batches = iter(open_data(recipe.data, None, recipe.batching, epochs=None))  # type: ignore[arg-type]
    for step, row in enumerate(rows(tmp_path / "run")):
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * factors(step)
        taken = [next(batches), next(batches)]
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in taken)
        loss = sum(model(**batch, num_items_in_batch=torch.tensor(count)).loss for batch in taken)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert row["num_label_tokens"] == count
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert row["lr"] == pytest.approx(2e-2 * factors(step))


def test_stopped_at_any_step_it_ends_bit_equal(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, packing, an average, and a checkpoint in the middle of an epoch."""
    path = make_recipe(lora={"r": 4, "lora_dropout": 0.1}, training={"average": 0.9}, checkpoint={"every": 2})
    run(path)
    asked = iter([False, False, True])
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "stop_requested", lambda self: next(asked))
        outcome = run(path, f"--output={tmp_path / 'stopped'}")
    assert (outcome.step, outcome.is_complete) == (3, False)
    assert not (tmp_path / "stopped" / "model").exists()
    again = run(path, f"--output={tmp_path / 'stopped'}")
    assert again.is_complete
    assert_same(tmp_path / "run", tmp_path / "stopped")


@pytest.mark.slow
def test_killed_it_ends_bit_equal(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = make_recipe(training={"steps": 40}, lora={"r": 4, "lora_dropout": 0.1}, checkpoint={"every": 3})
    run(path)
    folder = tmp_path / "killed"
    process = subprocess.Popen(command(path, f"--output={folder}"), cwd=ROOT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step-*")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "figures.json").exists(), "killed too late"
    subprocess.run(command(path, f"--output={folder}"), cwd=ROOT, check=True, timeout=300, stdout=subprocess.DEVNULL)
    assert_same(tmp_path / "run", folder)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [["shard=2"], ["shard=1", "tensor=2"]], ids=["shard", "tensor"])
def test_two_processes_have_the_losses_of_one(make_recipe: MakeRecipe, tmp_path: Path, mesh: Sequence[str]) -> None:
    path = make_recipe(lora={"r": 4})
    run(path)
    sizes = [f"--mesh.{size}" for size in mesh]
    arguments = [f"--output={tmp_path / 'two'}", "--nproc-per-node", "2", *sizes]
    subprocess.run(command(path, *arguments), cwd=ROOT, check=True, timeout=300, stdout=subprocess.DEVNULL)
    for one, two in zip(rows(tmp_path / "run"), rows(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert two["num_label_tokens"] == one["num_label_tokens"]
        assert two["tps_per_gpu"] == pytest.approx(two["tps"] / 2)
    last = [rows(tmp_path / name, "validation.jsonl")[-1] for name in ("run", "two")]
    assert last[1]["val_loss"] == pytest.approx(last[0]["val_loss"], abs=1e-5)
    assert last[1]["num_label_tokens"] == last[0]["num_label_tokens"]


def test_a_loss_that_is_not_finite_stops_with_its_batch_saved(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = make_recipe(
        optimizer={"kind": "sgd", "lr": 1e30}, training={"bad_steps": 2, "max_grad_norm": None}, schedule={"warmup": 0}
    )
    with pytest.raises(FloatingPointError, match="losses of 2 steps in a row were not finite"):
        run(path)
    (saved,) = (tmp_path / "run").glob("bad_batch_step_*_rank_0.safetensors")
    assert load_file(saved)["0.input_ids"].shape == (2, 32)
    bad = [
        row["step"] for row in rows(tmp_path / "run") if not isinstance(row["loss"], float) or math.isnan(row["loss"])
    ]
    assert f"step_{bad[0]}_" in saved.name


def test_a_folder_of_another_recipe_is_not_gone_on_with(make_recipe: MakeRecipe) -> None:
    path = make_recipe(training={"steps": 2}, validation=None, checkpoint={"export": False})
    run(path)
    with pytest.raises(ValueError, match=r"optimizer.lr was 0.02 and is 0.1.*choose another output"):
        run(path, "--optimizer.lr=0.1")
    with pytest.raises(ValueError, match=r"checkpoint\.resume is never"):
        run(path, "--checkpoint.resume=never")
    assert run(path, "--logging.every=2").step == 2  # nothing is left to do


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--training.global_batch_size=3"], "global_batch_size is 3, but 1 data ranks take 2 rows at once"),
        (["--model.path=./nowhere"], r"model.path ./nowhere: does not exist"),
        (["--checkpoint.resume=must"], "holds no checkpoint"),
        (["--schedule.warmup=100"], "warmup takes 100 steps, but the run has 6"),
        (["--optimizer.groups=[{pattern: 'x*'}]"], "'x.' fits no parameter"),
        (["--lora.target_modules=[nothing]"], "unknown target module 'nothing'"),
        (["--mesh.shard=4"], "needs 4 processes"),
        (["--training.step_in_backward=true"], "accumulate=2"),
    ],
    ids=["batch", "path", "resume", "warmup", "groups", "lora", "mesh", "in backward"],
)
def test_what_does_not_fit_is_said(make_recipe: MakeRecipe, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(make_recipe(), *overrides)


def test_the_command_says_errors_and_ends_with_2(make_recipe: MakeRecipe) -> None:
    done = subprocess.run(
        command(make_recipe(), "--optimizer.lrr=1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --optimizer.lrr=1: optimizer: unknown key 'lrr'. Did you mean 'lr'?")
    assert "Traceback" not in done.stderr
