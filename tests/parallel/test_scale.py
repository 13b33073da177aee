"""Two and four processes: every way to spread a model trains as plain transformers in one process; the checks are in scale.py."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.launching import launch
from tests.parallel.scale import MESHES, MICRO, STEPS, cases

pytestmark = pytest.mark.slow

CASES = [(world, f"{way}, {name}") for world in MESHES for way, name in cases(world)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """What a launch of that many processes found; one launch each."""

    @cache
    def run(world: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("scale")
        launch("tests.parallel.scale", folder, world)
        result: dict[str, Any] = json.loads((folder / "found.json").read_text())
        return result

    return run


@pytest.mark.parametrize(("world", "case"), CASES)
def test_trains_as_one_process(found: Callable[[int], dict[str, Any]], world: int, case: str) -> None:
    check = found(world)[case]
    assert check["problem"] == ""
    assert check["losses"] == STEPS * MICRO
    assert check["logits"] == 0
    assert check["passed on"] == {}
    assert check["refused"] == []


def test_a_wrong_factor_is_seen(found: Callable[[int], dict[str, Any]]) -> None:
    problem = found(2)["mutant: loss not multiplied"]["problem"]
    assert "norms" in problem
    assert "lm_head.weight: 5.0e-01" in problem
