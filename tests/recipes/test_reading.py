"""YAML with places, bases, variables and overrides."""

from pathlib import Path
from typing import Any

import pytest

from automodel_accel.recipes.reading import RecipeError, parse, read


def plain(text: str, **environment: str) -> Any:
    return parse(text, "recipe.yaml", environment).plain()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-5", 1e-5),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("0x10", 16),
        ("007", 7),
        ("true", True),
        ("no", "no"),
        ("off", "off"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("~", None),
        ("", {}),
        ('"1e-4"', "1e-4"),
        ("'null'", "null"),
        (".inf", float("inf")),
        ("1e", "1e"),
        ("a: ", {"a": None}),
        ("[1, [a, {b: 2}]]", [1, ["a", {"b": 2}]]),
        ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    assert plain(text) == value
    assert type(plain(text)) is type(value)


def test_anchors_and_merge_keys() -> None:
    text = "base: &b {x: 1, y: 2}\nother: {<<: *b, y: 3}\nboth:\n  <<: [*b, {x: 5, z: 6}]\n"
    assert plain(text)["other"] == {"x": 1, "y": 3}
    assert plain(text)["both"] == {"x": 1, "y": 2, "z": 6}


def test_variables() -> None:
    assert plain("a: ${env:RANKS}\nb: 'x-${env:RANKS}'\nc: ${env:NONE:-1e-3}", RANKS="8") == {
        "a": 8,
        "b": "x-8",
        "c": 1e-3,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [1, 2", "recipe.yaml:2:"),
        ("a: 1\n\tb: 2", "recipe.yaml:2:1"),
        ("a: 1\nb: 2\na: 3", "recipe.yaml:3:1: 'a' is given twice; the first is at recipe.yaml:1:1"),
        ("a: ${env:NOT_THERE}", "recipe.yaml:1:4: the environment variable NOT_THERE is not set"),
        ("a: ${oc.env:HOME}", "recipe.yaml:1:4: '${oc.env:HOME}' is not read"),
        ("a: ${env:HOME", "'${env:HOME' is not read"),
        ("a: !!python/object/apply:os.system ['true']", "recipe.yaml:1:4: the tag"),
        ("a: !mine 3", "recipe.yaml:1:4: the tag '!mine'"),
        ("a: &a {b: *a}", "an anchor that lies inside of itself"),
        ("? [1]\n: 2", "a key that is no word"),
        ("<<: 3", "`<<` takes a mapping"),
        ("a: 1\n---\nb: 2", "not YAML"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        plain(text)
    assert said in str(error.value)


def test_bases_are_merged_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "a.yaml").write_text("model: {name: a, dtype: float32}\nlist: [1, 2]\nkept: 1\n")
    (tmp_path / "bases" / "b.yaml").write_text("extends: a.yaml\nmodel: {name: b}\n")
    (tmp_path / "top.yaml").write_text("extends: [bases/b.yaml]\nmodel:\n  revision: main\nlist: [3]\n")
    entry = read(tmp_path / "top.yaml", ["--model.dtype=bfloat16", "new.key=[1, x]"])
    assert entry.plain() == {
        "model": {"name": "b", "dtype": "bfloat16", "revision": "main"},
        "list": [3],
        "kept": 1,
        "new": {"key": [1, "x"]},
    }
    assert isinstance(entry.value, dict)
    model = entry.value["model"].value
    assert isinstance(model, dict)
    assert str(model["name"].place) == f"{tmp_path}/bases/b.yaml:2:9"
    assert str(model["dtype"].place) == "--model.dtype=bfloat16"


def test_circles_lists_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "number.yaml").write_text("extends: 3")
    for name, said in [
        ("a.yaml", "extends itself"),
        ("list.yaml", "expected a mapping of sections, such as `model:`; got a list"),
        ("none.yaml", "cannot be read"),
        ("number.yaml", "expected the name of a YAML file"),
    ]:
        with pytest.raises(RecipeError, match=said):
            read(tmp_path / name)


@pytest.mark.parametrize("text", ["optimizer.lr", "=3", "a..b=1", "a.=1"])
def test_an_override_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text("a: 1")
    with pytest.raises(RecipeError, match=r"expected --SECTION.KEY=VALUE"):
        read(tmp_path / "a.yaml", [text])
