"""What producers note of their output for a cast to 8 bits: what the cast itself would find, bit for bit."""

import copy
import importlib
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from automodel_accel.kernels import gated_linear as gated_package
from automodel_accel.kernels import rms_norm as norm_package
from automodel_accel.kernels import room
from automodel_accel.kernels.fp8_linear import noted
from automodel_accel.kernels.fp8_linear.casts import cast_rows
from automodel_accel.kernels.fp8_linear.noted import Wish
from automodel_accel.kernels.fp8_linear.products import engine_on
from automodel_accel.kernels.fp8_linear.scaling import formats_here
from automodel_accel.kernels.rms_norm.through import rms_norm_through
from tests.budgets.watch import Watch
from tests.ops.checks import DEVICE
from tests.ops.mutants_fp8_noted import MUTANTS
from tests.ops.mutation import Mutant, check_caught

if engine_on(DEVICE) != "native":
    pytest.skip("this GPU multiplies no 8-bit values", allow_module_level=True)

E4M3, FNUZ = formats_here().e4m3, torch.float8_e4m3fnuz
WISHES = (Wish(), Wish(E4M3), *([Wish(FNUZ)] if DEVICE == "cpu" else []))
INTERPRETED = pytest.mark.skipif(DEVICE != "cpu", reason="counts in the interpreter, or changes what is compiled")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODULES = [
    importlib.import_module(f"automodel_accel.kernels.{name}")
    for name in ("rms_norm.fused", "rms_norm.add_fused", "gated_linear.fused")
]
COLUMNS = 24

Producer = Callable[..., Any]


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def producers(implementation: str = "triton") -> dict[str, tuple[Producer, int]]:
    """What notes, and how many inputs of one shape it takes; a norm with a weight that differs from column to column."""
    named: dict[str, Any] = {"implementation": implementation}

    def weight(x: torch.Tensor) -> torch.Tensor:
        return torch.linspace(-1.5, 1.5, x.shape[-1]).to(x)

    return {
        "rms_norm": (lambda x: norm_package.rms_norm(x, weight(x), 1e-6, **named), 1),
        "rms_norm, last": (
            lambda x: norm_package.rms_norm(x, weight(x), 1e-6, offset=1.0, order="mul_then_cast", **named),
            1,
        ),
        "add_rms_norm": (lambda x, r: norm_package.add_rms_norm(x, r, weight(x), 1e-6, scale=0.5, **named), 2),
        "rms_norm_through": (lambda x: rms_norm_through(x, None, 1e-6, **named), 1),
        "gated_linear": (lambda gate, up: gated_package.gated_linear(gate, up, **named), 2),
        "gated_linear, packed": (lambda gate, up: gated_package.gated_linear(torch.cat([gate, up], -1), **named), 2),
    }


NAMES = tuple(producers())


def draw(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    """Rows of several scales; the last one is zeros where there are some."""
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    for x in drawn:
        rows = x.view(-1, shape[-1])
        rows *= torch.logspace(-3, 2, len(rows))[:, None]
        rows[1:][-1:] = 0
    return [x.to(DEVICE, dtype) for x in drawn]


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Bit for bit, but for the bits of a NaN."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[theirs.itemsize]
    real = ~theirs.float().isnan()
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype) or not torch.equal(~ours.float().isnan(), real):
        return False
    return torch.equal(ours.view(bits)[real], theirs.view(bits)[real])


def check_noted(noted: ModuleType, wish: Wish, y: torch.Tensor, cast: bool = True) -> None:
    """What is noted of y, against what a cast finds in it."""
    rows = y.detach().reshape(-1, y.shape[-1])
    amax_N = noted.maxima_of(y)
    assert amax_N is not None
    assert same(amax_N, rows.abs().float().amax(1))
    found = noted.cast_of(y)
    if wish.dtype is None or not cast:
        assert found is None
        return
    assert found is not None
    expected = cast_rows([rows], wish.dtype, True)
    assert expected.q is not None
    assert found.q_t is None
    assert same(found.scale, expected.scale)
    assert same(found.q, expected.q)


def check_producer(noted: ModuleType, producer: Producer, inputs: list[torch.Tensor], wish: Wish) -> None:
    """The same bits as without a wish, forward and backward, and the right ones noted."""
    found = []
    for wanted in (None, wish):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = first(noted.noted(wanted, producer, *leaves))
        grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
        found.append([y, *torch.autograd.grad(y, leaves, grad)])
    plain, with_note = found
    assert noted.maxima_of(plain[0]) is None
    assert noted.cast_of(plain[0]) is None
    assert all(map(same, map(torch.detach, with_note), map(torch.detach, plain)))
    check_noted(noted, wish, with_note[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wish", WISHES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_cast_of_the_output_would_find(name: str, wish: Wish, dtype: torch.dtype) -> None:
    producer, count = producers()[name]
    for shape in ((2, 3, 40), (5, 33), (1, 1), (7,), (3, 1030)):
        check_producer(noted, producer, draw(shape, dtype, count), wish)


def extremes(largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and ups of rows with an infinity, a NaN, both, and values at the ends of what a float32 holds; silu(gate) = gate."""
    up = torch.ones(8, 1030)
    up[:, ::2] = -1
    gate = torch.full((8, 1030), 120.0)
    gate[0, 3] = math.inf
    gate[1, 1029] = math.nan
    gate[2, 0], gate[2, 1025] = math.nan, math.inf
    gate[3], gate[4], gate[5] = 3e38, largest, largest * 1.001
    up[6], up[7] = 1e-42, -3e-36
    return gate.to(DEVICE), up.to(DEVICE)


@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_rows_of_extremes(wish: Wish) -> None:
    gate, up = extremes(torch.finfo(wish.dtype or E4M3).max)
    check_noted(noted, wish, noted.noted(wish, gated_package.gated_linear, gate, up, implementation="triton"))


def check_ends_of_rows(noted: ModuleType) -> None:
    """A norm whose rstd is infinite: what is beside the row would be 0 * inf."""
    x, weight = torch.full((4, 33), 1e-30, device=DEVICE), torch.ones(33, device=DEVICE)
    weight[::2] = -math.inf
    for wish in WISHES:
        y = noted.noted(wish, norm_package.rms_norm, x, weight, 0.0, implementation="triton")
        assert y.isinf().all()
        check_noted(noted, wish, y)


def test_ends_of_rows() -> None:
    check_ends_of_rows(noted)


@pytest.mark.parametrize("wish", WISHES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_strided_rows_and_room_beside_the_output(name: str, wish: Wish) -> None:
    producer, count = producers()[name]
    inputs = [x[:, : x.shape[1] // 2] for x in draw((5, 80), torch.bfloat16, count)]
    check_producer(noted, lambda *leaves: room.left(COLUMNS, producer, *leaves), inputs, wish)
    y = first(noted.noted(wish, room.left, COLUMNS, producer, *inputs))
    assert room.beside(y) >= COLUMNS
    check_noted(noted, wish, y)
    y = first(room.left(COLUMNS, noted.noted, wish, producer, *inputs))
    assert room.beside(y) >= COLUMNS
    check_noted(noted, wish, y)


def test_of_a_row_too_long_for_one_program_there_is_no_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULES[2], "LONGEST", 1500)
    for size in (1500, 1501, 2050):
        inputs = draw((3, size), torch.bfloat16, 2)
        y = noted.noted(Wish(E4M3), gated_package.gated_linear, *inputs, implementation="triton")
        check_noted(noted, Wish(E4M3), y, cast=size <= 1500)


@INTERPRETED
@pytest.mark.parametrize("wish", WISHES[:2], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_it_moves(name: str, wish: Wish) -> None:
    """4 bytes a row, or a tile of a row, which one launch reduces; with the cast 8 bytes a row and 1 an element."""
    producer, count = producers()[name]
    rows, size = 6, 1030
    inputs = draw((rows, size), torch.bfloat16, count)
    moved, launches = [], []
    for wanted in (None, wish):
        with Watch() as watch:
            noted.noted(wanted, producer, *inputs)
        moved.append(watch.moved)
        launches.append([launch.name for launch in watch.launches])
    if wish.dtype is not None:
        assert moved[1] - moved[0] == rows * (8 + size)
        assert launches[1] == launches[0]
    elif name.startswith("gated"):
        tiles = 2
        assert moved[1] - moved[0] == rows * (4 * tiles + 4 * tiles + 4)
        assert launches[1] == [*launches[0], "amax"]
    else:
        assert moved[1] - moved[0] == rows * 4
        assert launches[1] == launches[0]


@pytest.mark.parametrize("wish", WISHES[:2], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_other_implementations_note_nothing(name: str, wish: Wish) -> None:
    producer, count = producers("torch")[name]
    y = first(noted.noted(wish, producer, *draw((5, 33), torch.bfloat16, count)))
    assert noted.maxima_of(y) is None
    assert noted.cast_of(y) is None


@pytest.mark.parametrize("name", NAMES)
def test_no_row_at_all(name: str) -> None:
    producer, count = producers()[name]
    y = first(noted.noted(Wish(E4M3), producer, *[torch.ones(0, 8, device=DEVICE)] * count))
    assert y.shape == (0, 8)
    assert noted.maxima_of(y) is None


def a_norm(noted: ModuleType, wish: Wish) -> torch.Tensor:
    (x,) = draw((5, 33), torch.bfloat16, 1)
    return noted.noted(wish, norm_package.rms_norm, x, None, 1e-6, implementation="triton")  # type: ignore[no-any-return]


def check_what_it_holds_for(noted: ModuleType) -> None:
    """This very tensor, as long as nobody has written to it."""
    y = a_norm(noted, Wish(E4M3))
    check_noted(noted, Wish(E4M3), y)
    for other in (y.clone(), y[:3], y.view(5, 33), y.detach(), y * 1, None, "text"):
        assert noted.maxima_of(other) is None
        assert noted.cast_of(other) is None
    copied = copy.deepcopy(y)  # its attributes as well
    assert noted.maxima_of(copied) is None
    y[2, 3] = 100
    assert noted.maxima_of(y) is None
    assert noted.cast_of(y) is None


def test_what_it_holds_for() -> None:
    check_what_it_holds_for(noted)


def check_casts_at_hand(noted: ModuleType) -> None:
    """The newest cast alone; maxima are few."""
    older = a_norm(noted, Wish(E4M3))
    y = a_norm(noted, Wish())
    check_noted(noted, Wish(), y)
    check_noted(noted, Wish(E4M3), older)
    y = a_norm(noted, Wish(E4M3))
    check_noted(noted, Wish(E4M3), y)
    check_noted(noted, Wish(E4M3), older, cast=False)


def test_the_newest_cast_alone_is_kept() -> None:
    check_casts_at_hand(noted)


def check_who_is_asked(noted: ModuleType) -> None:
    """Producers of this thread, inside the block, for their own output, on a machine that can."""
    assert noted.wanted("cpu") is None
    seen = []
    with noted.noting(Wish(E4M3)):
        with noted.noting(Wish()):
            assert noted.wanted("cpu") == Wish()
        assert noted.wanted("cpu") == Wish(E4M3)
        thread = threading.Thread(target=lambda: seen.append(noted.wanted("cpu")))
        thread.start()
        thread.join()
        with pytest.MonkeyPatch.context() as patch:
            for arch, wish in (("sm_80", Wish()), ("sm_90", Wish(E4M3)), ("gfx942", Wish(E4M3)), ("gfx90a", Wish())):
                patch.setattr(noted, "this_machine", lambda arch=arch: SimpleNamespace(arch=arch))
                assert noted.wanted("cuda") == wish
    assert seen == [None]
    assert noted.wanted("cpu") is None

    def twice(x: torch.Tensor) -> torch.Tensor:
        return norm_package.rms_norm(x, None, 1e-6, implementation="triton") * 2

    assert noted.maxima_of(noted.noted(Wish(), twice, *draw((5, 33), torch.bfloat16, 1))) is None


def test_who_is_asked() -> None:
    check_who_is_asked(noted)


def test_nothing_is_noted_under_torch_compile_nor_in_inference() -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        y = noted.noted(Wish(E4M3), norm_package.rms_norm, x, None, 1e-6, implementation="triton")
        return y if noted.maxima_of(y) is None else y * 0

    (x,) = draw((5, 33), torch.bfloat16, 1)
    plain = norm_package.rms_norm(x, None, 1e-6, implementation="triton")
    assert torch.equal(torch.compile(norm, backend="eager", fullgraph=True)(x), plain)
    with torch.inference_mode():
        assert torch.equal(norm(x), plain)


@INTERPRETED
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(_: ModuleType) -> None:
        folder = "automodel_accel.kernels.fp8_linear"
        module = sys.modules[f"{folder}.noted"]
        for producing in MODULES:
            monkeypatch.setattr(producing, "noted", module)
            monkeypatch.setattr(producing, "note_row", sys.modules[f"{folder}.noted_fused"].note_row)
        check_who_is_asked(module)
        check_what_it_holds_for(module)
        check_casts_at_hand(module)
        check_ends_of_rows(module)
        for wish in WISHES:
            gate, up = extremes(torch.finfo(wish.dtype or E4M3).max)
            y = module.noted(wish, gated_package.gated_linear, gate, up, implementation="triton")
            check_noted(module, wish, y)
            for producer, count in producers().values():
                check_producer(module, producer, draw((3, 1030), torch.bfloat16, count), wish)

    check_caught(mutant, check, tmp_path)
