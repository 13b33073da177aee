"""Models of runs, opened again: from what was exported and from checkpoints, here and on another machine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from automodel_accel.cli import app
from automodel_accel.recipes.opening import STORED, open_model
from automodel_accel.recipes.recipe import load
from automodel_accel.recipes.running import run_recipe
from tests.recipes.conftest import MakeRecipe
from tests.tiny import tiny


@pytest.fixture
def run(make_recipe: MakeRecipe, tmp_path: Path) -> Any:
    """Trains 3 steps in tmp_path/run; sections as of make_recipe."""

    def train(**sections: Any) -> Path:
        training = {"steps": 3, **sections.pop("training", {})}
        recipe = load(make_recipe(validation=None, training=training, **sections))
        run_recipe(recipe, recipe.mesh.ranks(), said=lambda text: None)
        return tmp_path / "run"

    return train


def differing(one: Any, other: Any) -> list[str]:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("average", [None, 0.9], ids=["last", "averaged"])
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_a_checkpoint_is_opened_as_what_the_run_exported(run: Any, lora: Any, average: float | None) -> None:
    folder = run(lora=lora, training={"average": average})
    assert differing(open_model(str(folder)).model, open_model(str(folder), step=3).model) == []


def test_a_run_in_another_dtype_than_auto_is_here(run: Any) -> None:
    """As one that trained in bfloat16 on a GPU, and is asked on a CPU."""
    folder = run(model={"dtype": "bfloat16"})
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("dtype: bfloat16", "dtype: auto", 1))
    for step, dtype, expected in (
        (3, "auto", torch.float32),
        (3, STORED, torch.bfloat16),
        (None, STORED, torch.bfloat16),
    ):
        model = open_model(str(folder), step=step, dtype=dtype).model
        assert {one.dtype for one in model.parameters()} == {expected}


@pytest.mark.parametrize("step", [None, 3], ids=["exported", "checkpoint"])
def test_an_adapter_is_merged_into_the_base_as_it_was_stored(run: Any, tmp_path: Path, step: int | None) -> None:
    tiny("llama", torch.bfloat16).save_pretrained(tmp_path / "base")
    folder = run(model={"path": str(tmp_path / "base")}, lora={"r": 4})
    chosen = [] if step is None else ["--step", str(step)]
    for dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        to = tmp_path / f"merged {dtype}"
        asked = [] if dtype is None else ["--dtype", dtype]
        result = CliRunner().invoke(app, ["export", str(folder), "--to", str(to), *chosen, *asked])
        assert result.exit_code == 0, result.output
        merged = AutoModelForCausalLM.from_pretrained(to, dtype="auto")
        assert {one.dtype for one in merged.parameters()} == {expected}
        assert differing(merged, AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=expected)) != []


def test_the_card_of_a_merged_model_speaks_of_no_adapter_to_load(run: Any, tmp_path: Path) -> None:
    folder = run(lora={"r": 4})
    for name, options in (("merged", []), ("adapter", ["--adapter"])):
        result = CliRunner().invoke(app, ["export", str(folder), "--to", str(tmp_path / name), *options])
        assert result.exit_code == 0, result.output
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("merged", "adapter")}
    head = (folder / "model" / "README.md").read_text().partition("<details>")[0]
    assert cards["adapter"].startswith(head)
    assert "PeftModel" in head
    assert "library_name: transformers" in cards["merged"]
    assert "a LoRA adapter of rank 4, merged into them" in cards["merged"]
    assert "PeftModel" not in cards["merged"]


def test_a_run_with_frozen_parts(run: Any) -> None:
    folder = run(model={"freeze": {"embeddings": True}})
    assert differing(open_model(str(folder)).model, open_model(str(folder), step=3).model) == []
