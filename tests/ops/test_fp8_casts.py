"""Casts to 8 bits in Triton have the bits of those by torch operations, which define them."""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

triton = pytest.importorskip("triton")

from automodel_accel.kernels import fp8_linear as package
from automodel_accel.kernels.contract import Spec, choose
from automodel_accel.kernels.facts import this_machine
from automodel_accel.kernels.fp8_linear import casts, casts_fused
from automodel_accel.kernels.fp8_linear.casts import Cast
from automodel_accel.kernels.fp8_linear.scaling import formats_here, parts_of_largest
from tests.ops.mutants_fp8_casts import HOST, KERNELS, MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16)
E4M3 = formats_here().e4m3
FORMATS = (E4M3, formats_here().e5m2)
FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
Asked = Sequence[tuple[bool, bool]]
ASKED = ((True, False), (False, True), (True, True))  # straight, transposed
BOTH = ASKED[2:]
SHAPES = ((1, 16), (3, 48), (17, 80), (33, 1040), (130, 144))
CASES = (*((shape, torch.bfloat16) for shape in SHAPES), *((SHAPES[2], dtype) for dtype in DTYPES))
SPECIAL = (0.0, -0.0, 1e-45, -1e-40, 1e-30, 1e30, -448.0, 464.0, float("inf"), -float("inf"), float("nan"))
SMALL = {  # tiles, so that few elements have many
    "TILE_ROWS": 16,
    "TILE_COLS": 16,
    "FLAT": 16,
    "SIDE_ROWS": 8,
    "SIDE_COLS": 8,
    "SIDE_STEPS": 2,
    "PARTIALS": 2,
    "PARTIAL_COLS": 16,
}
Make = Callable[[ModuleType], Sequence[Cast | None]]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Rows and columns of very different sizes, a few of them zero."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = (torch.randn(size, generator=generator).mul(3).exp2() for size in shape)
    values = torch.randn(shape, generator=generator) * rows[:, None] * cols
    values[torch.rand(shape, generator=generator) < 0.1] = 0
    return values.to(DEVICE, dtype)


def powers(*shape: int, seed: int) -> torch.Tensor:
    """Scales of rows."""
    return torch.randint(-20, 20, shape, generator=torch.Generator().manual_seed(seed)).float().exp2().to(DEVICE)


def same_bits(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    """Equal bits, and NaN in the same places (whose payload and sign no hardware fixes)."""
    assert (ours is None) == (theirs is None)
    if ours is None or theirs is None:
        return
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert ours.is_contiguous()
    real, bits = ~theirs.float().isnan(), torch.uint8 if ours.element_size() == 1 else torch.int32
    assert torch.equal(~ours.float().isnan(), real)
    assert torch.equal(ours.view(bits)[real], theirs.view(bits)[real])


def same(make: Make) -> None:
    """The casts that a function makes with a module are the same of both."""
    host = casts_in_force()
    for ours, theirs in zip(make(host), make(casts), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            same_bits(ours.q, theirs.q)
            same_bits(ours.q_t, theirs.q_t)
            same_bits(ours.scale, theirs.scale)


def casts_in_force() -> ModuleType:
    """The module itself, or the mutant that has taken its place."""
    return sys.modules[casts_fused.__name__]


def rows_alike(
    tensors: Sequence[torch.Tensor],
    dtype: torch.dtype = E4M3,
    amax_R: torch.Tensor | None = None,
    kinds: Sequence[bool] = (True, False),
    asked: Asked = ASKED,
) -> None:
    """Rowwise and with one scale, straight, transposed and both."""
    before = [x.clone() for x in tensors]
    for rowwise, (straight, transposed) in itertools.product(kinds, asked):
        options = {"straight": straight, "transposed": transposed, "amax_R": amax_R}
        same(lambda module, how=(rowwise, options): [module.cast_rows(tensors, dtype, how[0], **how[1])])
    for x, copy in zip(tensors, before, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)


def gradients_alike(
    gradients: Sequence[torch.Tensor],
    dtype: torch.dtype = E4M3,
    kinds: Sequence[bool] = (True, False),
    asked: Asked = ASKED,
) -> None:
    """Rowwise and with one scale, for the input's gradient, the weights' and both."""
    before = [g.clone() for g in gradients]
    n_rows, n_cols = len(gradients[0]), sum(g.shape[1] for g in gradients)
    for rowwise, (of_input, of_weights) in itertools.product(kinds, asked):
        sizes = ((n_cols, 1), (n_rows, 1)) if rowwise else ((), ())
        scales = [powers(*size, seed=i) for i, size in enumerate(sizes)]
        options = {"weight_scale": scales[0] if of_input else None, "x_scale": scales[1] if of_weights else None}
        same(lambda module, how=(rowwise, options): module.cast_gradients(gradients, dtype, how[0], **how[1]))
    for g, copy in zip(gradients, before, strict=True):
        torch.testing.assert_close(g, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows_alike([normal(*shape, dtype=dtype)])


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_gradients(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gradients_alike([normal(*shape, dtype=dtype)])


@pytest.mark.parametrize("dtype", FORMATS if torch.cuda.is_available() else (*FORMATS, *FNUZ), ids=str)
def test_formats(dtype: torch.dtype) -> None:
    x = normal(18, 80)
    x[3, :4] = torch.tensor([-0.0, -1e-6, 1e30, -1e30])
    x[4, 5], x[7, 8], x[9, 10] = float("nan"), float("inf"), -float("inf")
    rows_alike([x[:3]], dtype)
    rows_alike([x], dtype)
    gradients_alike([x[:3]], dtype)
    gradients_alike([x], dtype)


def test_rows_longer_than_a_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(casts_fused, "LONGEST_ROW", 1024)
    rows_alike([normal(70, 1040, seed=1), normal(5, 1040, seed=2)])
    gradients_alike([normal(5, 1040)])


def test_nobody_asks_for_values() -> None:
    for rowwise in (False, True):
        x, scales = normal(5, 32), {"weight_scale": None, "x_scale": None}
        same(lambda module, x=x, rowwise=rowwise: [module.cast_rows([x], E4M3, rowwise, straight=False)])
        same(lambda module, x=x, rowwise=rowwise, scales=scales: module.cast_gradients([x], E4M3, rowwise, **scales))


def test_several_tensors() -> None:
    rows_alike([normal(16, 80, seed=1), normal(33, 80, seed=2), normal(5, 80, seed=3)])
    gradients_alike([normal(19, 48, seed=1), normal(19, 1040, seed=2), normal(19, 16, seed=3)])


def test_several_dtypes() -> None:
    rows_alike([normal(16, 80, seed=1), normal(33, 80, seed=2, dtype=torch.float32)])


def test_strides() -> None:
    both = normal(20, 96)
    for x in (both[:, 16:80], both[::2, :48], both.t(), both[:, :1].expand(20, 48), both[:1].expand(20, 96)):
        rows_alike([x])
        gradients_alike([x])


def test_all_the_same() -> None:
    """As the gradient of a sum is."""
    x = torch.full((), 3.0, device=DEVICE).expand(20, 48)
    rows_alike([x])
    gradients_alike([x, x])


@pytest.mark.parametrize("shape", [(0, 16), (0, 0), (3, 0)], ids=str)
def test_nothing(shape: tuple[int, int]) -> None:
    x = torch.ones(shape, device=DEVICE)
    rows_alike([x])
    rows_alike([x, normal(5, shape[1])] if shape[1] else [x, x])
    if shape[1]:
        gradients_alike([x])


def test_largest_values_that_are_known() -> None:
    x = normal(40, 80)
    known = x.abs().float().amax(1)
    rows_alike([x], amax_R=known)
    rows_alike([x[:17], x[17:]], amax_R=known)
    rows_alike([x], amax_R=known / 8)  # of an earlier step: values saturate
    rows_alike([x], amax_R=torch.stack([known, known], 1)[:, 0])
    rows_alike([x], amax_R=known.index_fill(0, torch.tensor([3], device=DEVICE), float("nan")))


@pytest.mark.parametrize("special", SPECIAL, ids=str)
def test_special_values(special: float) -> None:
    x = normal(20, 80, dtype=torch.float32).clamp(-1e3, 1e3)
    x[7, 79] = special
    for one in (x, torch.full_like(x, special)):
        rows_alike([one], asked=BOTH)
        gradients_alike([one], asked=BOTH)


@pytest.mark.parametrize(("row", "col"), [(0, 0), (7, 39), (16, 16), (17, 39)])
def test_nan_in_each_place(row: int, col: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SMALL.items():
        monkeypatch.setattr(casts_fused, name, size)
    x = normal(18, 40)
    x[row, col] = float("nan")
    rows_alike([x], asked=BOTH)
    gradients_alike([x], asked=BOTH)


def test_the_largest_value_around_each_step_of_the_scale() -> None:
    most = torch.finfo(E4M3).max
    for amax in (most, most * 1.0001, most * 0.9999, most * 2, 2.0**-120, 2.0**-108, 3e38):
        rows_alike([torch.tensor([[amax, -amax / 3] + [amax / 7] * 14] * 3, device=DEVICE)])


def test_the_transpose() -> None:
    for shape in (*SHAPES, (0, 16)):
        q = normal(*shape).to(E4M3)
        same_bits(casts_fused.transposed(q), casts.transposed(q))
    q = normal(20, 96).to(E4M3)
    for part in (q[:, 16:80], q.t()):
        same_bits(casts_fused.transposed(part), casts.transposed(part))


def test_what_is_padded_is_zero() -> None:
    for x in (normal(17, 48), torch.full((17, 48), float("nan"), device=DEVICE)):
        for rowwise in (False, True):
            q_t = casts_fused.cast_rows([x], E4M3, rowwise, transposed=True).q_t
            ones = [
                torch.ones(size, 1, device=DEVICE) if rowwise else torch.ones((), device=DEVICE) for size in (48, 17)
            ]
            turned = casts_fused.cast_gradients([x], E4M3, rowwise, weight_scale=ones[0], x_scale=ones[1])[1]
            assert q_t is not None
            assert turned is not None
            assert turned.q_t is not None
            for part in (q_t, turned.q_t):
                assert part.shape == (48, 32)
                assert not part.view(torch.uint8)[:, 17:].any()


@pytest.mark.parametrize(
    ("dtype", "parts"),
    [
        (torch.float8_e4m3fn, (8, 0.75)),
        (torch.float8_e5m2, (15, 0.75)),
        (torch.float8_e4m3fnuz, (7, 0.875)),
        (torch.float8_e5m2fnuz, (15, 0.75)),
    ],
    ids=str,
)
def test_the_largest_value_of_a_format(dtype: torch.dtype, parts: tuple[int, float]) -> None:
    exponent, mantissa = parts_of_largest(dtype)
    assert (exponent, mantissa / 2**23) == parts
    assert 2.0**exponent * (1 + mantissa / 2**23) == torch.finfo(dtype).max


@pytest.mark.parametrize(("arch", "name"), [("sm_90", "triton"), ("gfx942", "triton"), ("sm_80", "torch")])
def test_where_the_formats_compile(arch: str, name: str) -> None:
    facts = replace(this_machine(), arch=arch, packages={"triton": "3.6.0"}, triton_interpreter=False)
    chosen = choose(package.KERNEL, facts, Spec("cuda", torch.bfloat16, 64)).winner
    assert chosen is not None
    assert chosen.name == name


@pytest.mark.skipif(DEVICE == "cuda", reason="launches are counted in Triton's interpreter")
def test_launches_are_as_many_as_stated() -> None:
    from tests.budgets.watch import Watch

    def launches(run: Callable[[], object]) -> int:
        with Watch() as watch:
            run()
        return len(watch.launches)

    torch.use_deterministic_algorithms(False)  # filling memory would count
    x, scales = normal(20, 48), {"weight_scale": powers(96, 1, seed=0), "x_scale": powers(20, 1, seed=1)}
    one, known = dict.fromkeys(scales, powers(seed=0)), x.abs().float().amax(1).repeat(2)
    two, both = [x, x], {"transposed": True}
    assert launches(lambda: casts_fused.cast_rows(two, E4M3, False, **both)) == 4
    assert launches(lambda: casts_fused.cast_rows(two, E4M3, True)) == 2
    assert launches(lambda: casts_fused.cast_rows(two, E4M3, True, **both)) == 3
    assert launches(lambda: casts_fused.cast_rows(two, E4M3, True, **both, amax_R=known)) == 2
    assert launches(lambda: casts_fused.cast_rows(two, E4M3, False, **both, amax_R=known)) == 3
    assert launches(lambda: casts_fused.cast_gradients(two, E4M3, False, **one)) == 4
    assert launches(lambda: casts_fused.cast_gradients(two, E4M3, True, **scales)) == 5
    of_input = {"weight_scale": scales["weight_scale"][:48], "x_scale": None}
    assert launches(lambda: casts_fused.cast_gradients([x], E4M3, True, **of_input)) == 1
    assert launches(lambda: casts_fused.transposed(x.to(E4M3))) == 1 + 1  # and the cast


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("wide_gradients", [False, True])
def test_linears_are_the_same_with_both(rowwise: bool, frozen: bool, wide_gradients: bool) -> None:
    outcomes = []
    for implementation in ("triton", "torch"):
        x = normal(2 * 9, 48, dtype=torch.float32, seed=1).view(2, 9, 48).requires_grad_()
        weights = [normal(size, 48, seed=size, dtype=torch.float32).requires_grad_(not frozen) for size in (32, 16)]
        biases = [None, torch.ones(16, device=DEVICE, requires_grad=True)]
        held = package.HeldCast() if frozen else None
        recipe = package.Recipe(rowwise, wide_gradients)
        outputs = package.fp8_linears(x, weights, biases, recipe, held=held, implementation=implementation)
        grads = [normal(18, y.shape[-1], seed=i, dtype=torch.float32).view_as(y) for i, y in enumerate(outputs)]
        leaves = [one for one in (x, *weights, biases[1]) if one is not None and one.requires_grad]
        outcomes.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)


UNIQUE = {KERNELS: "import triton\n", HOST: "import torch\n"}


def check_casts(_: ModuleType) -> None:
    """What no mutant must survive: each kernel with several tiles, steps, programs and tensors, and what is not finite."""
    host, kernels = casts_in_force(), sys.modules["automodel_accel.kernels.fp8_linear.fused"]
    x, y = normal(36, 48, seed=1)[::2, :40], normal(5, 40, seed=2)
    odd, q = normal(5, 16, seed=3), normal(18, 48).to(E4M3)
    odd[0, 0], odd[1, 1], odd[2, 2] = float("nan"), float("inf"), -float("inf")
    exact = torch.tensor([[448.0], [240.0], [2.0**-120], [449.0], [-3.0]], device=DEVICE).expand(5, 16)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in SMALL.items():
            patch.setattr(host, name, size)
        for name in [name for name in vars(host) if name.endswith("_kernel")]:
            patch.setattr(host, name, getattr(kernels, name))
        rows_alike([exact], kinds=[True], asked=BOTH)
        rows_alike([x, y], asked=BOTH)
        gradients_alike([x[:, :16], normal(18, 40, seed=4)], asked=BOTH)
        gradients_alike([x], kinds=[True], asked=ASKED[:1])
        rows_alike([odd], asked=BOTH)
        rows_alike([odd], amax_R=-torch.full((5,), float("nan"), device=DEVICE), kinds=[True], asked=BOTH)
        same_bits(host.transposed(q[:, :40]), casts.transposed(q[:, :40]))
        known = torch.cat([x, y]).abs().float().amax(1) / 8
        rows_alike([x, y], FNUZ[0] if DEVICE == "cpu" else E4M3, amax_R=known, asked=BOTH)
        gradients_alike([odd], kinds=[True], asked=BOTH)
        patch.setattr(host, "LONGEST_ROW", 8)
        rows_alike([x, y], kinds=[True], asked=BOTH)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.why)
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    check_caught(mutant, check_casts, tmp_path)


@pytest.mark.parametrize("file", [KERNELS, HOST])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    with mutated(Mutant(file, UNIQUE[file], UNIQUE[file], "no mistake"), tmp_path) as fp8_linear:
        check_casts(fp8_linear)
