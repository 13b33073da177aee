"""docs/recipes.md: its tables are those of the dataclasses, and its recipes can be read."""

import re
from pathlib import Path

import pytest

from automodel_accel.recipes.filling import to_plain
from automodel_accel.recipes.recipe import Recipe, load
from tests.recipes import keys_table

DOCS = keys_table.PAGE.parent
PAGES = ("recipes.md", "migration_liger.md", "migration_unsloth.md")
YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WHOLE = [(page, match) for page in PAGES for match in YAML.findall((DOCS / page).read_text(encoding="utf-8"))]


def test_the_tables_are_those_of_the_code() -> None:
    page = keys_table.PAGE.read_text(encoding="utf-8")
    assert page == keys_table.written(page), "python -m tests.recipes.keys_table writes them"


def test_every_key_is_explained() -> None:
    rows = [line for line in keys_table.tables().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


def test_no_section_is_missing() -> None:
    shown = {name for name, _ in keys_table.SECTIONS} | {"data", "validation", "output"}
    assert set(Recipe.__dataclass_fields__) <= shown


@pytest.mark.parametrize(("page", "text"), WHOLE, ids=[f"{page} {number}" for number, (page, _) in enumerate(WHOLE)])
def test_recipes_of_the_pages_are_read(page: str, text: str, tmp_path: Path) -> None:
    """Each is a whole recipe, or some sections of one."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    needed = {"model": "{path: demo:smollm2}", "data": "{kind: chat, path: demo:chatterbot}"}
    missing = [f"--{key}={value}" for key, value in needed.items() if not re.search(rf"^{key}:", text, re.MULTILINE)]
    base = tmp_path / "base.yaml"
    base.write_text("model: {path: demo:smollm2}\ndata: {kind: chat, path: demo:chatterbot}\n", encoding="utf-8")
    environment = {"DATA": "rows.jsonl"}
    assert to_plain(load(recipe, missing, environment))["model"]["path"]
