"""Two processes that train FP8 linears whose weights FSDP2 gathers in 8 bits; see fp8_distributed.py."""

from typing import Any

import pytest
import torch

from automodel_accel.kernels.fp8_linear import Recipe, casts, fp8_linears, sharded
from tests.launching import of_each
from tests.swap.fp8_distributed import MICRO, OTHERS, RECIPES, ROWS, STEPS, WAYS, H

pytestmark = pytest.mark.slow

PROCESSES, ITEMSIZE = 2, {"bfloat16": 2, "mixed": 2}  # of what is gathered as it is; else 4

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of the two processes found, of one launch."""
    return of_each("tests.swap.fp8_distributed", tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("check", [*WAYS, "one process", "checkpoints", "changed", "held", "applied"])
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
def test_applied_models(found: Found, recipe: str) -> None:
    """Less is sent, nothing is passed on, and what cannot be is said."""
    for rank in found:
        ours, plain = rank[f"{recipe}, applied"]["wire"]
        assert ours < 0.6 * plain
        assert "fully_shard comes first" in rank[f"{recipe}, applied"]["late"]
        assert "has no FP8 linears; call automodel_accel.apply" in rank[f"{recipe}, applied"]["unapplied"]


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


def gathered(weight: torch.Tensor, recipe: Recipe, alike: Any) -> torch.Tensor:
    """As FSDP2 gives it, of one process."""
    cast = casts.cast_rows([weight], torch.float8_e4m3fn, recipe.rowwise, amax_R=weight.new_ones(len(weight)).float())
    assert cast.q is not None
    extension = sharded._Extension(weight, None if recipe.rowwise else alike, casts)
    sent = (cast.q.view(torch.uint8), *([cast.scale] if recipe.rowwise else []))
    made = extension.post_all_gather(sent, None if recipe.rowwise else cast.scale, weight.dtype)
    assert made is not None
    return made[0].requires_grad_()


@pytest.mark.parametrize("way", ["together", "apart", "by another recipe", "one is plain"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_casts_that_do_not_fit_are_made_again(recipe: Recipe, way: str) -> None:
    """Of the values that the bytes stand for; and where they fit, nothing else is multiplied either."""
    generator = torch.Generator().manual_seed(0)
    plain = [torch.rand(rows, H, generator=generator) * 2 - 1 for rows in (16, 48)]
    largest = sharded._Largest([plain])
    groups = [(largest, 0), (largest, 1 if way == "apart" else 0)]
    weights = [gathered(weight, recipe, alike) for weight, alike in zip(plain, groups, strict=True)]
    values = [weight.detach().clone().requires_grad_() for weight in weights]
    if way == "one is plain":
        weights[1] = values[1].detach().requires_grad_()
    x = torch.randn(8, H, generator=generator)
    used = Recipe(rowwise=recipe.rowwise != (way == "by another recipe"))
    found = []
    for given in (weights, values):
        leaf = x.clone().requires_grad_()
        outputs = fp8_linears(leaf, given, [None, None], used)
        torch.cat(outputs, 1).sin().sum().backward()
        found.append([*outputs, leaf.grad, *(weight.grad for weight in given)])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert theirs is not None
        assert type(ours) is type(theirs) is torch.Tensor
        assert torch.equal(ours, theirs)


def test_a_plain_linear_reads_the_values() -> None:
    """With its gradient."""
    weight = gathered(torch.rand(16, H), Recipe(), (sharded._Largest([]), 0))
    values = weight.detach().clone().requires_grad_()
    x = torch.randn(4, H)
    for given in (weight, values):
        torch.nn.functional.linear(x, given).square().sum().backward()
    assert weight.grad is not None
    assert values.grad is not None
    assert torch.equal(weight.grad, values.grad)
