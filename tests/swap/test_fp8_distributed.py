"""Two processes that train FP8 linears whose weights FSDP2 gathers in 8 bits; see fp8_distributed.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.swap.fp8_distributed import MICRO, OTHERS, RECIPES, ROWS, STEPS, WAYS, H

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PROCESSES, ITEMSIZE = 2, {"bfloat16": 2, "mixed": 2}  # of what is gathered as it is; else 4

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of the two processes found, of one launch."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [*LAUNCH, "-m", "tests.swap.fp8_distributed", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("check", [*WAYS, "one process", "checkpoints", "changed", "held"])
def test_bit_for_bit(found: Found, recipe: str, check: str) -> None:
    """Losses, parameters and states are those of weights that are gathered as they are, and those of one process."""
    assert [rank[f"{recipe}, {check}"]["problem"] for rank in found] == ["", ""]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("way", WAYS)
def test_wire(found: Found, recipe: str, way: str) -> None:
    """A byte an element of a weight, no gather more, and one all-reduce of scales a step, whatever the micro-batches (of frozen weights one for ever)."""
    itemsize, rows_scales = ITEMSIZE.get(way, 4), 4 * ROWS if recipe == "rowwise" else 0
    gathers = (MICRO if way == "accumulated" else 1) * (1 if way == "kept" else 2) * STEPS
    ours = gathers * (ROWS * H + rows_scales + OTHERS * itemsize) // PROCESSES
    plain = gathers * (ROWS * H + OTHERS) * itemsize // PROCESSES
    for rank in found:
        result = rank[f"{recipe}, {way}"]
        assert result["gathered"] == [ours, plain]
        assert result["gathers"][0] == result["gathers"][1]
        assert result["scales"] == (0 if recipe == "rowwise" else 1 if way == "frozen" else STEPS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_dict(found: Found, recipe: str) -> None:
    """Nothing of ours is in it."""
    for rank in found:
        assert rank[f"{recipe}, checkpoints"]["kinds"]
        assert rank[f"{recipe}, checkpoints"]["attributes"] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_reaches_all_processes(found: Found, recipe: str) -> None:
    assert all(rank[f"{recipe}, changed"]["nan"] for rank in found)


@pytest.mark.parametrize("recipe", RECIPES)
def test_read_by_other_operations(found: Found, recipe: str) -> None:
    """A linear that is not swapped computes with the rounded values; nobody can write into them."""
    for rank in found:
        others = rank[f"{recipe}, others"]
        assert (others["kind"], others["dtype"], others["grads"]) == ("Gathered", "torch.float32", True)
        assert 0 < others["error"] <= 2**-4, "half of the last place of 3 bits of mantissa"
        assert "aten.mul_.Tensor would write into a weight that was gathered in 8 bits" in others["write"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_held_casts_are_whole(found: Found, recipe: str) -> None:
    """Of weights that are gathered as they are, what is held is q and q_t of every layer on every process."""
    assert [rank[f"{recipe}, held"]["bytes"] for rank in found] == [2 * ROWS * H] * PROCESSES


@pytest.mark.parametrize("mistake", ["stale", "of a part"])
def test_mutants(found: Found, mistake: str) -> None:
    """A scale of before the step, or of the rows of one process."""
    assert all(rank[mistake]["problem"].startswith("differ") for rank in found)


def test_refusals(found: Found) -> None:
    for rank in found:
        said = rank["refusals"]
        assert "it is no parameter of FSDP2; fully_shard comes first" in said["plain"]
        assert "its shape (33, 16) has no equal rows for 2 processes" in said["odd"]
        assert "its shape (32,) has no equal rows" in said["vector"]
        assert "FSDP2 has gathered in 8 bits already" in said["late"]
        assert "a weight is a DTensor that lies as (Shard(dim=0),)" in said["DTensor"]
        assert said["left"] == []
