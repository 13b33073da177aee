"""Casts by delayed scales: the history, what saturates, and Triton with the bits of torch operations, which define them."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from automodel_accel.kernels import fp8_linear as package
from automodel_accel.kernels.fp8_linear import Recipe, casts, delayed, delayed_fused
from automodel_accel.kernels.fp8_linear.casts import Cast
from automodel_accel.kernels.fp8_linear.history import LENGTH, Histories, History
from automodel_accel.kernels.fp8_linear.scaling import scale_of
from automodel_accel.kernels.recompute import remember, source_of
from tests.budgets.traffic import MOST
from tests.budgets.watch import Watch
from tests.ops.allocations import Allocations
from tests.ops.mutants_fp8_delayed import KERNEL, MUTANTS, NODE
from tests.ops.mutation import Mutant, check_caught, mutated
from tests.ops.test_fp8_casts import ASKED, DEVICE, DTYPES, E4M3, FNUZ, FORMATS, SHAPES, normal, same_bits

Tensors = Sequence[torch.Tensor]
TOP = torch.finfo(E4M3).max


def in_force(name: str) -> ModuleType:
    """The module itself, or the mutant that has taken its place."""
    return sys.modules[f"automodel_accel.kernels.fp8_linear.{name}"]


def both(
    calls: Sequence[Tensors], dtype: torch.dtype = E4M3, straight: bool = True, transposed: bool = True
) -> History:
    """The calls in turn by Triton and by torch: the same casts, scales and histories; the latter's history."""
    mine, theirs = in_force("history").History(), in_force("history").History()
    asked = {"straight": straight, "transposed": transposed}
    for tensors in calls:
        before = [x.clone() for x in tensors]
        ours = in_force("delayed_fused").cast(tensors, dtype, mine, **asked)
        same_cast(ours, delayed.cast(tensors, dtype, theirs, **asked))
        known = in_force("delayed_fused").cast(tensors, dtype, mine, scale=ours.scale, **asked)
        same_cast(known, ours)
        same_bits(mine.amax(), theirs.amax())
        assert torch.equal(mine.saturated(), theirs.saturated())
        for x, copy in zip(tensors, before, strict=True):
            torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)
    return theirs


def same_cast(ours: Cast, theirs: Cast) -> None:
    same_bits(ours.q, theirs.q)
    same_bits(ours.q_t, theirs.q_t)
    same_bits(ours.scale, theirs.scale)


def apart(tensors: Tensors) -> list[Tensors]:
    """Calls that grow, shrink, vanish and come back."""
    factors = (1.0, 40.0, 1e-6, 0.0, 1.0)
    return [[x * factor for x in tensors] for factor in factors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_tensor(shape: tuple[int, int]) -> None:
    assert both(apart([normal(*shape)])).saturated() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("straight", "transposed"), ASKED)
def test_what_is_asked_for(dtype: torch.dtype, straight: bool, transposed: bool) -> None:
    both(apart([normal(17, 80, dtype=dtype).clamp(-99, 99)]), E4M3, straight, transposed)


@pytest.mark.parametrize("dtype", FORMATS if torch.cuda.is_available() else (*FORMATS, *FNUZ), ids=str)
def test_formats(dtype: torch.dtype) -> None:
    both(apart([normal(18, 80)]), dtype)


def test_side_by_side() -> None:
    x = normal(20, 96)
    both(apart([normal(19, 48, seed=1), normal(19, 1040, seed=2), normal(19, 16, seed=3)]))
    both([[x[:, 16:80]], [x[::2, :48]], [x.t()], [x[:1].expand(20, 96)], [x[:, :0]], [x[:0]], [x]])
    both(apart([torch.full((), 3.0, device=DEVICE).expand(20, 48)]))


@pytest.mark.parametrize("special", [0.0, -0.0, 1e-45, 1e30, 3e38, float("inf"), -float("inf"), float("nan")], ids=str)
def test_special_values(special: float) -> None:
    """In the first call, in a later one, and in all of it."""
    x = normal(20, 80, dtype=torch.float32).clamp(-1e3, 1e3)
    odd = x.clone()
    odd[7, 79] = special
    for one in (odd, torch.full_like(x, special)):
        both([[one], [x], [one], [x]])


def check_scales(module: Any) -> None:
    """Of the history and not of the call; the largest of LENGTH calls, a power of two above it."""
    history, ones = in_force("history").History(), torch.ones(4, 16, device=DEVICE)
    sizes = [1.0, 8.0, 1.0, 300.0, *([2.0] * (LENGTH + 2)), 0.5]
    for n, size in enumerate(sizes):
        x = torch.cat([ones * size / 2, -ones * size], 1)
        cast = module.cast([x], E4M3, history)
        seen = torch.tensor(max(sizes[max(0, n - LENGTH) : n], default=size), device=DEVICE)
        assert cast.scale == scale_of(seen, E4M3) * (2 if n else 1)
        expected = casts.saturated(x, 1 / cast.scale, E4M3)
        same_bits(cast.q, expected)


def check_counts(module: Any) -> None:
    """Exactly what is past the largest value; twice the largest of the history just fits; recovered at the next call."""
    history = in_force("history").History()
    x = torch.full((19, 48), TOP, device=DEVICE)
    x[:, :16] = -TOP
    y = x.clone()
    y[3, 5], y[4, 6], y[18, 47] = 2 * TOP, -2.01 * TOP, 1000 * TOP
    for n, (one, scale, saturated) in enumerate([(x, 1, 0), (x, 2, 0), (y, 2, 2), (y, 2048, 2), (10 * y, 2048, 3)]):
        cast = module.cast([one], E4M3, history)
        assert (cast.scale.item(), history.saturated().item()) == (scale, saturated), n
        assert cast.q.float().abs().max() <= TOP
    before, cast = history.saturated(), module.cast([x * 0 + float("nan")], E4M3, history)
    assert cast.q.float().isnan().all()
    assert history.saturated() == before


def check_not_finite(module: Any) -> None:
    """Each such value is NaN where it stands; the history is as if the call had not been."""
    x = normal(20, 48).clamp(-50, 50)
    odd = x.clone() * 1e4
    odd[3, 4], odd[5, 6], odd[7, 8] = float("inf"), -float("inf"), float("nan")
    history = in_force("history").History()
    scales = [module.cast([one], E4M3, history).scale for one in (x, x, odd, x)]
    assert scales[1] == scales[2] == scales[3]
    assert history.saturated() == (odd.isfinite() & (odd.abs() > TOP * scales[2])).sum() > 0
    cast = module.cast([odd], E4M3, history)
    assert torch.equal(cast.q.float().isnan(), ~odd.isfinite())
    history = in_force("history").History()
    assert module.cast([odd], E4M3, history).q.float().isnan().all()
    assert module.cast([odd], E4M3, history).scale == 1
    assert module.cast([x], E4M3, history).scale == 1
    assert module.cast([x], E4M3, history).scale == 2 * scale_of(x.abs().amax().float(), E4M3)


@pytest.mark.parametrize("name", ["delayed", "delayed_fused"])
@pytest.mark.parametrize("check", [check_scales, check_counts, check_not_finite])
def test_the_history(check: Callable[[Any], None], name: str) -> None:
    check(in_force(name))


@pytest.mark.parametrize("module", [delayed, delayed_fused])
def test_zeros(module: Any) -> None:
    history, x = History(), torch.zeros(4, 16, device=DEVICE)
    casts_made = [module.cast([x], E4M3, history) for _ in range(3)]
    assert [cast.scale.item() for cast in casts_made[1:]] == [1, 1]
    assert not any(cast.q.float().any() for cast in casts_made)
    assert history.saturated() == 0


@pytest.mark.parametrize("module", [delayed, delayed_fused])
def test_nothing_is_asked_of_the_device(module: Any) -> None:
    history, x = History(), normal(19, 48)
    with Allocations() as watched:
        for _ in range(3):
            module.cast([x], E4M3, history, transposed=True)
        history.amax()
        history.saturated()
    assert watched.operations
    forbidden = ("item", "_local_scalar_dense", "nonzero")
    assert not [name for name in watched.operations if any(word in name for word in forbidden)]


# linears


def linears(
    found: Any, x: torch.Tensor, histories: Histories | None, recipe: Recipe, **settings: Any
) -> list[torch.Tensor]:
    """Output and gradients of two linears of one input."""
    weights = [normal(width, 48, seed=width, dtype=torch.float32).requires_grad_() for width in (32, 16)]
    x = x.clone().requires_grad_()
    given = x
    if settings.pop("noted", False):
        given = x * 1
        remember(given, lambda source: source * 1, x)
        settings["source"] = source_of(given)
        assert settings["source"] is not None
    outputs = found.fp8_linears(given, weights, [None, None], recipe, histories=histories, **settings)
    loss = sum((output * torch.arange(1.0, 1 + output.shape[-1], device=DEVICE)).sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *weights])]


def check_linears(found: Any) -> None:
    """Tensorwise where scales reach: powers of two, so that but for what is least the values are the same."""
    x = normal(2, 9 * 48, dtype=torch.float32).clamp(0.5, 9).view(18, 48)
    recipe, histories = Recipe(delayed=True), in_force("history").Histories()
    expected = linears(found, x, None, Recipe())
    for n in range(3):
        for ours, theirs in zip(linears(found, x, histories, recipe, noted=n == 2), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert (histories.x.calls, histories.gradients.calls, histories.saturated()) == (3, 3, 0)
    large = linears(found, x * 4, histories, recipe)
    most = TOP * 2 * scale_of(x.amax(), E4M3)
    clamped = linears(found, (x * 4).clamp(-most, most), None, Recipe())
    assert torch.equal(large[0], clamped[0])
    assert torch.equal(large[-1], clamped[-1])
    assert histories.saturated() == (x * 4 > most).sum() > 0
    assert histories.gradients.saturated() == 0
    noted = in_force("history").Histories()
    for size in (1, 1, 4):  # computed again by the scale of forward, whatever the history says by then
        found_again = linears(found, x * size, noted, recipe, noted=True)
    assert torch.equal(found_again[-1], clamped[-1])


def test_linears() -> None:
    check_linears(package)


@pytest.mark.parametrize("wide", [False, True])
def test_linears_are_the_same_with_both(wide: bool) -> None:
    outcomes = []
    for implementation in ("triton", "torch"):
        histories, x = Histories(), normal(18, 48, dtype=torch.float32, seed=1)
        recipe = Recipe(wide_gradients=wide, delayed=True)
        calls = [linears(package, x * size, histories, recipe, implementation=implementation) for size in (1, 9, 0.1)]
        outcomes.append([tensor for call in calls for tensor in call] + [histories.x.saturated()])
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)


def test_without_histories_the_scales_are_current() -> None:
    x = normal(18, 48, dtype=torch.float32)
    for ours, theirs in zip(*(linears(package, x, None, Recipe(delayed=one)) for one in (True, False)), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_have_no_delayed_scales() -> None:
    with pytest.raises(ValueError, match="no call knows the rows of the next"):
        Recipe(rowwise=True, delayed=True)


@pytest.mark.parametrize("tensors", [1, 3])
def test_bytes_moved(tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """x is read once, q and q_t are written once."""
    x, history = [normal(256, 256, seed=i) for i in range(tensors)], History()
    delayed_fused.cast(x, E4M3, history, transposed=True)
    with Watch() as watched:
        delayed_fused.cast(x, E4M3, history, transposed=True)
    assert [launch.name for launch in watched.launches] == ["delayed_cast_kernel"] * tensors
    floor = sum(4 * one.numel() for one in x)
    assert floor < watched.moved <= MOST * floor


UNIQUE = {KERNEL: "import triton\n", NODE: "import functools\n"}
SMALL = {"TILE_ROWS": 16, "TILE_COLS": 16}


def check_calls(module: Any) -> None:
    """All that the history is held to."""
    for check in (check_counts, check_not_finite, check_scales):
        check(module)


def check_all(found: Any) -> None:
    """What no mutant must survive: several tiles, programs, tensors and calls, and what is not finite."""
    host = in_force("delayed_fused")
    with pytest.MonkeyPatch.context() as patch:
        for name, size in SMALL.items():
            patch.setattr(host, name, size)
        for name in ("History", "Histories", "delayed_scale", "LENGTH", "MARGIN"):
            for module in (delayed, host):
                if hasattr(module, name):
                    patch.setattr(module, name, getattr(in_force("history"), name))
        check_calls(in_force("delayed"))
        check_linears(found)
        x = normal(36, 48, seed=1)[::2, :40]
        odd = normal(18, 40, seed=3)
        odd[0, 0], odd[1, 39], odd[17, 2] = float("nan"), float("inf"), -float("inf")
        both([[x, x[:, :16] * size] for size in (1, 40, 0)], FNUZ[0] if DEVICE == "cpu" else E4M3)
        both([[x], [odd], [odd * float("nan")], [-x * 50], [odd]])
        check_calls(host)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.why)
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    check_caught(mutant, check_all, tmp_path)


@pytest.mark.parametrize("file", [KERNEL, NODE])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    with mutated(Mutant(file, UNIQUE[file], UNIQUE[file], "no mistake"), tmp_path) as found:
        check_all(found)
