"""A tiny model in a folder, and a recipe that trains it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import VOCABULARY, tiny

MakeRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def make_recipe(model_folder: Path, tmp_path: Path) -> MakeRecipe:
    """Writes a recipe: sections given replace those here, key by key."""

    def make(**sections: Any) -> Path:
        mock = {"kind": "mock", "vocab_size": VOCABULARY, "shortest": 8}
        recipe: dict[str, Any] = {
            "model": {"path": str(model_folder)},
            "data": {**mock, "samples": 200},
            "validation": {"held_out": {**mock, "samples": 19, "seed": 7}},
            "batching": {"seq_length": 32, "batch_size": 2},
            "optimizer": {"lr": 2e-2},
            "training": {"steps": 6, "global_batch_size": 4},
            "output": str(tmp_path / "run"),
        }
        for name, section in sections.items():
            old = recipe.get(name)
            recipe[name] = {**old, **section} if isinstance(old, dict) and isinstance(section, dict) else section
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({name: one for name, one in recipe.items() if one is not None}))
        return path

    return make
