"""What the source of every kernel keeps to: static launches, no atomics, nothing that makes the host wait."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
FILES = sorted(KERNELS.rglob("*.py"))
ALLOWED = {  # functions that read values of a tensor
    "linear_cross_entropy/__init__.py: check_targets",  # on a CPU only
    "linear_cross_entropy/eager.py: scale_",  # on a CPU only
    "linear_cross_entropy/chunks.py: rows_that_count",  # on a CPU only
    "experts/grouped.py: _groups",  # where torch has no grouped product
    "attention/tiles.py: _spans",  # "packed", on a CPU, and "torch"
    "attention/flash.py: _read",  # once for all layers of a step
}
JUDGES = {"numerics.py", "attention/measure.py"}  # no part of a forward or a backward
READS = frozenset({"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "masked_select"})


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(file: name, function) of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield f"{path.relative_to(KERNELS)}: {node.name}", node


def calls(node: ast.AST) -> Iterator[ast.Call]:
    return (one for one in ast.walk(node) if isinstance(one, ast.Call))


def is_launch(call: ast.Call) -> bool:
    """kernel[grid](...)."""
    return isinstance(call.func, ast.Subscript) and ast.unparse(call.func.value).endswith("_kernel")


LAUNCHES = [
    (name, call) for path in FILES for name, function in functions(path) for call in calls(function) if is_launch(call)
]


def test_launches_are_found() -> None:
    assert len(LAUNCHES) >= 20


@pytest.mark.parametrize("keyword", ["num_warps", "enable_fp_fusion"])
def test_every_launch_says_how(keyword: str) -> None:
    """Whether products and sums are fused is no default of a compiler's version; neither is the number of warps."""
    assert [name for name, call in LAUNCHES if keyword not in {word.arg for word in call.keywords}] == []


def test_nothing_is_tuned_at_run_time() -> None:
    """No autotuner: it would run again for each new number of tokens, and take another kernel on another day."""
    decorators = {
        f"{name}: {ast.unparse(one)}" for path in FILES for name, f in functions(path) for one in f.decorator_list
    }
    assert {one for one in decorators if "autotune" in one or "heuristics" in one} == set()


def test_no_atomics() -> None:
    called = [(name, ast.unparse(call.func)) for path in FILES for name, f in functions(path) for call in calls(f)]
    assert [one for one in called if "atomic" in one[1]] == []


def test_nothing_else_makes_the_host_wait() -> None:
    found = {
        name
        for path in FILES
        if str(path.relative_to(KERNELS)) not in JUDGES
        for name, function in functions(path)
        for call in calls(function)
        if isinstance(call.func, ast.Attribute) and call.func.attr in READS
    }
    assert found == ALLOWED
