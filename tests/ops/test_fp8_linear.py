"""FP8 linears: held to their definition in float64, to the hardware's bits, and to how far 8 bits may be from exact linears."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from automodel_accel.kernels import fp8_linear as package
from automodel_accel.kernels.fp8_linear import Recipe, casts, reference
from automodel_accel.kernels.fp8_linear.products import EMULATED, NATIVE, product
from automodel_accel.kernels.fp8_linear.scaling import formats_here, formats_of, scale_of
from automodel_accel.kernels.fp8_linear.weights import HeldCast
from automodel_accel.kernels.recompute import remember, source_of
from tests.ops import checks
from tests.ops.mutants_fp8_linear import HELD, KEPT, VALUES
from tests.ops.mutation import Mutant, check_caught

WIDTHS = (32, 16)
RECIPES = {"tensorwise": Recipe(), "rowwise": Recipe(rowwise=True), "tensorwise_e5m2": Recipe(wide_gradients=True)}
SHAPES = ((2, 4, 64), (1, 16), (3, 48), (17, 80), (0, 16), (2, 0, 32), (16,))
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def operation(recipe: Recipe, found: Any = package) -> checks.Operation:
    """Two linears of one input, the second with a bias; both outputs in a row."""

    def inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> checks.Tensors:
        hidden = -(-shape[-1] // 16) * 16
        weights = [checks.normal(generator, (width, hidden), dtype) * hidden**-0.5 for width in WIDTHS]
        x = checks.normal(generator, (*shape[:-1], hidden), dtype)
        return x, *weights, checks.normal(generator, WIDTHS[1:], dtype)

    def ours(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.cat(found.fp8_linears(x, [first, second], [None, bias], recipe), -1)

    def theirs(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return torch.cat([F.linear(x, first), F.linear(x, second, bias)], -1)
        gradients = E5M2 if recipe.wide_gradients else E4M3
        return torch.cat(reference.fp8_linears(x, [first, second], [None, bias], recipe.rowwise, E4M3, gradients), -1)

    return checks.Operation(ours, theirs, inputs)


@pytest.mark.parametrize("engine", [NATIVE, EMULATED])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_equals_its_definition(dtype: torch.dtype, name: str, engine: str) -> None:
    """Everything that other operations are held to; the truth is the definition in float64."""
    if (engine, dtype, checks.DEVICE) == (NATIVE, torch.float32, "cuda"):
        pytest.skip(
            "8-bit units of a GPU sum in fewer bits than float32 holds; the test of noise says how near they come"
        )
    recipe = Recipe(RECIPES[name].rowwise, RECIPES[name].wide_gradients, engine)
    checks.check_everything(operation(recipe), dtype, SHAPES)


def check_rows_apart(found: Any, recipe: Recipe, dtype: torch.dtype) -> None:
    """Rows of x, of the weights and of the gradient that are far from one another in size."""
    made = operation(recipe, found)
    x, first, second, bias = made.draw((6, 32), dtype)
    x, first, second = (tensor * torch.logspace(-1, 2, len(tensor)).to(dtype)[:, None] for tensor in (x, first, second))
    grad_output = checks.normal(torch.Generator().manual_seed(3), (6, sum(WIDTHS)), dtype)
    for scales in (torch.logspace(0, -3, 6)[:, None], torch.logspace(1, -2, sum(WIDTHS))):
        checks.check_values(made, (x, first, second * 30, bias), grad_output * scales.to(dtype))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_rows_far_apart(dtype: torch.dtype, name: str) -> None:
    check_rows_apart(package, RECIPES[name], dtype)


def sqnr(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Signal over noise, in dB."""
    truth = truth.double()
    return (10 * torch.log10(truth.square().sum() / (found.double() - truth).square().sum())).item()


def draw(kind: str, *shape: int) -> torch.Tensor:
    """Values as activations, weights or gradients have them."""
    if kind == "heavy tails":
        return torch.distributions.StudentT(4.0).sample(shape)
    return torch.randn(shape) if kind == "normal" else torch.rand(shape) * 2 - 1


@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy tails"])
@pytest.mark.parametrize("shape", [(64, 256, 128), (100, 64, 512), (33, 1024, 48)])
@pytest.mark.parametrize("name", RECIPES)
def test_noise_of_each_product(name: str, shape: tuple[int, int, int], kind: str) -> None:
    """28 dB with E4M3 (its 3 bits of mantissa in both operands allow 29.5 at most on such values), 24 dB where gradients are E5M2."""
    torch.manual_seed(0)
    rows, hidden, out = shape
    drawn = (draw(kind, rows, hidden), draw(kind, out, hidden) * 0.02, draw(kind, rows, out) * 1e-4)
    *leaves, grad_output = (values.bfloat16().to(checks.DEVICE) for values in drawn)

    def products(function: Any, cast: Any) -> list[torch.Tensor]:
        x, weight = (cast(leaf).requires_grad_() for leaf in leaves)
        y = function(x, weight)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), cast(grad_output))]

    truth = products(F.linear, lambda x: x.double())
    found = products(lambda x, w: package.fp8_linears(x, [w], [None], RECIPES[name])[0], lambda x: x.clone())
    noise = [sqnr(one, exact) for one, exact in zip(found, truth, strict=True)]
    assert noise[0] >= 28.0
    assert min(noise[1:]) >= (24.0 if RECIPES[name].wide_gradients else 28.0), noise


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (torch.float8_e4m3fnuz, torch.float8_e4m3fnuz)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hardware_equals_emulation(dtype: torch.dtype, formats: Any, rowwise: bool) -> None:
    """The products of the same 8-bit values: the same bits but where a sum lies next to a tie, and there one unit off."""
    if checks.DEVICE == "cuda" and formats[1] is not formats_here().e4m3:
        pytest.skip(f"this GPU multiplies {formats_here().e4m3}")
    torch.manual_seed(1)
    a, b = (
        casts.cast_rows([(torch.randn(rows, 96) * scale).to(checks.DEVICE)], kind, rowwise)
        for rows, scale, kind in zip((40, 32), (3.0, 0.1), formats, strict=True)
    )
    bias = torch.randn(32).to(checks.DEVICE)
    native, emulated = (product(a.q, b.q, a.scale, b.scale, bias, dtype, engine) for engine in (NATIVE, EMULATED))
    apart = (native.double() - emulated.double()).abs()
    unit = torch.finfo(torch.bfloat16 if a.q.is_cuda else dtype).eps * emulated.double().abs().clamp(
        min=emulated.double().abs().max() * 2**-6
    )
    assert (apart <= unit).all()
    assert dtype is torch.float32 or (apart == 0).double().mean() > 0.99


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_scales(dtype: torch.dtype) -> None:
    """Powers of two, the least that holds amax; never 0, and infinite or NaN only as amax is."""
    most = torch.finfo(dtype).max
    amax = torch.tensor([most, most * (1 + 2**-23), most / 2, 1.0, 3e38, 1e-25, 2**-130, 0.0])
    scale = scale_of(amax, dtype)
    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
    assert (amax.double() / scale.double() <= most).all()
    assert (amax.double()[:6] / scale.double()[:6] > most / 2).all()
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert (1 / scale).isfinite().all()
    assert torch.equal(scale_of(torch.tensor([float("inf")]), dtype), torch.tensor([float("inf")]))
    assert scale_of(torch.tensor([float("nan")]), dtype).isnan().all()


def test_formats_of_an_architecture() -> None:
    assert (formats_of("sm_90").e4m3, formats_of("gfx950").e4m3) == (E4M3, E4M3)
    assert (formats_of("gfx942").e4m3, formats_of("gfx942").e5m2) == (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@pytest.mark.parametrize("name", RECIPES)
def test_zeros(name: str) -> None:
    """Of x, of the weights, of the gradient: products of zero, and no NaN from a scale."""
    for zero in range(3):
        x, weight, grad = (
            torch.zeros(s) if i == zero else torch.randn(s) for i, s in enumerate(((4, 32), (16, 32), (4, 16)))
        )
        x, weight = x.requires_grad_(), weight.requires_grad_()
        (y,) = package.fp8_linears(x, [weight], [None], RECIPES[name])
        grads = torch.autograd.grad(y, (x, weight), grad)
        assert all(one.isfinite().all() for one in (y, *grads))
        assert [bool((one == 0).all()) for one in (y, *grads)] == [zero < 2, zero > 0, zero != 1]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stays_so(name: str, value: float) -> None:
    """What a loop looks at to skip the step: in tensorwise in every gradient, else wherever that element goes."""
    x, weight, grad = (
        torch.randn(4, 32, requires_grad=True),
        torch.randn(16, 32, requires_grad=True),
        torch.randn(4, 16),
    )
    grad[1, 2] = value
    (y,) = package.fp8_linears(x, [weight], [None], RECIPES[name])
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    assert not grad_x[1].isfinite().any()
    assert not grad_weight[2].isfinite().any()


def step_of(weight: torch.Tensor, held: HeldCast) -> torch.Tensor:
    x = torch.linspace(-1, 1, 96).view(3, 32)
    (y,) = package.fp8_linears(x, [weight], [None], held=held)
    return y  # type: ignore[no-any-return]


class Counted:
    """A module of casts that counts those of weights."""

    def __init__(self) -> None:
        self.weights = 0

    def cast_rows(self, tensors: Any, **options: Any) -> Any:
        self.weights += tensors[0].requires_grad or isinstance(tensors[0], torch.nn.Parameter)
        return casts.cast_rows(tensors, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(casts, name)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    counter = Counted()
    monkeypatch.setattr(package, "implementation_module", lambda *_: counter)
    return counter


def check_held(held_type: type[HeldCast], counter: Counted) -> None:
    """Weights are cast once until they change: in place, by an optimizer that leaves no version, or to others."""
    held, weight = held_type(), torch.nn.Parameter(torch.randn(16, 32))
    before = step_of(weight, held).detach().clone()
    for _ in range(3):
        assert torch.equal(step_of(weight, held).detach(), before)
    assert counter.weights == 1, "an unchanged weight was cast again"
    with torch.no_grad():
        weight.mul_(-1)
    assert torch.equal(step_of(weight, held).detach(), -before), "a weight changed in place kept its old cast"
    optimizer = torch.optim.SGD([weight], lr=0.0)
    weight.data.mul_(-1)
    optimizer.step()
    assert torch.equal(step_of(weight, held).detach(), before), "a step that left no version was not seen"
    for _ in range(2):
        step_of(weight, held).sum().backward()
    seen = counter.weights
    assert torch.equal(step_of(weight, held).detach(), before)
    assert counter.weights == seen, "a weight was cast again between micro-batches"
    weight.data.mul_(2)
    weight.grad = None
    assert torch.equal(step_of(weight, held).detach(), 2 * before), "a step by hand that left no version was not seen"
    weight.data.mul_(0.5)
    optimizer.step()
    weight = torch.nn.Parameter(-weight.detach())
    assert torch.equal(step_of(weight, held).detach(), -before), "another weight got the cast of the first"
    frozen = torch.nn.Parameter(weight.detach(), requires_grad=False)
    step_of(frozen, held)
    seen = counter.weights
    optimizer.step()
    step_of(frozen, held)
    assert counter.weights == seen, "a frozen weight was cast again after a step"


def test_held_casts(counted: Counted) -> None:
    check_held(HeldCast, counted)


def test_outputs_may_be_written_to() -> None:
    """As those of F.linear; some models scale them in place."""
    x, weight = torch.randn(2, 3, 32), torch.randn(16, 32, requires_grad=True)
    found = []
    for in_place in (True, False):
        (y,) = package.fp8_linears(x, [weight], [None])
        y = y.mul_(2) if in_place else y * 2
        found.append(torch.autograd.grad(y.sum(), weight)[0])
    assert torch.equal(*found)


def check_kept(found: Any) -> None:
    """Of x one byte an element where a weight trains; nothing where none does; its source where it has one."""

    def saved(trains: bool, noted: bool = False) -> int:
        sizes: dict[int, int] = {}
        x, weight = torch.randn(32, 64).bfloat16().requires_grad_(), torch.randn(16, 64).bfloat16()
        held, source = HeldCast(), None
        if noted:
            plain, x = x, x * 1
            remember(x, lambda one: one * 1, plain)
            source = source_of(x)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found.fp8_linears(x, [weight.requires_grad_(trains)], [None], held=held, source=source)
        return sum(sizes.values())

    assert saved(trains=True) == 32 * 64 + 4
    assert saved(trains=True, noted=True) == 2 * 32 * 64
    assert saved(trains=False) == 0


def test_what_is_kept() -> None:
    check_kept(package)


def check_transposed(found: Any) -> None:
    """Nothing is transposed for a frozen weight, and x not where it will be computed again."""
    asked = []
    real = casts.cast_rows

    def cast_rows(*args: Any, **options: Any) -> Any:
        asked.append(options.get("transposed", False))
        return real(*args, **options)

    for trains, expected in ((False, [False, False]), (True, [True, True])):
        asked.clear()
        x, weight = torch.randn(4, 32, requires_grad=True), torch.randn(16, 32, requires_grad=trains)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(casts, "cast_rows", cast_rows)
            (y,) = found.fp8_linears(x, [weight], [None], held=HeldCast())
            y.sum().backward()
        assert asked == expected


def test_what_is_transposed() -> None:
    check_transposed(package)


@pytest.mark.parametrize("held", [None, HeldCast()], ids=["cast twice", "held"])
def test_source_in_place_of_the_input(held: HeldCast | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 32, requires_grad=True)
    plain = torch.randn(5, 32, requires_grad=True)
    found = []
    for noted in (False, True):
        x = plain * 3
        if noted:
            remember(x, lambda one: one * 3, plain)
        (y,) = package.fp8_linears(x, [weight], [None], RECIPES["rowwise"], held=held, source=source_of(x))
        found.append([y, *torch.autograd.grad(y.square().sum(), (plain, weight))])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(x_dtype: torch.dtype) -> None:
    """The dtypes of F.linear under autocast, and the values of the definition rounded to its dtype."""
    torch.manual_seed(0)
    x = torch.randn(5, 32).to(x_dtype).requires_grad_()
    weight, bias = torch.randn(16, 32, requires_grad=True), torch.randn(16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = package.fp8_linears(x, [weight], [bias])
        assert y.dtype == F.linear(x, weight, bias).dtype
    grads = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert [grad.dtype for grad in grads] == [x_dtype, torch.float32, torch.float32]
    wide = reference.fp8_linears(x.double(), [weight.double()], [bias.bfloat16().double()], False)[0]
    assert torch.equal(y, wide.bfloat16())


@pytest.mark.parametrize(
    ("x", "weights", "biases", "said"),
    [
        ((3, 32), [(16, 48)], [None], r"expected \[F, 32\]"),
        ((3, 32), [(24, 32)], [None], "multiples of 16"),
        ((3, 40), [(16, 40)], [None], "multiples of 16"),
        ((3, 32), [(16, 32)], [], "one .* for each"),
    ],
)
def test_bad_input(x: Any, weights: Any, biases: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        package.fp8_linears(torch.randn(x), list(map(torch.randn, weights)), biases)


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        package.fp8_linears(torch.randn(3, 32).double(), [torch.randn(16, 32).double()], [None])


@pytest.mark.parametrize("mutant", VALUES, ids=lambda mutant: mutant.why)
def test_mutants_of_values_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    def check(found: ModuleType) -> None:
        for recipe, dtype in itertools.product(RECIPES.values(), (torch.float32, torch.bfloat16)):
            checks.check_shape(operation(recipe, found), dtype, (5, 32))
            check_rows_apart(found, recipe, dtype)

    check_caught(mutant, check, tmp_path)


@pytest.mark.parametrize("mutant", HELD, ids=lambda mutant: mutant.why)
def test_mutants_of_held_casts_are_caught(mutant: Mutant, tmp_path: Path, counted: Counted) -> None:
    import sys

    check_caught(
        mutant,
        lambda _: check_held(sys.modules["automodel_accel.kernels.fp8_linear.weights"].HeldCast, counted),
        tmp_path,
    )


@pytest.mark.parametrize("mutant", KEPT, ids=lambda mutant: mutant.why)
def test_mutants_of_what_is_kept_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    def check(found: ModuleType) -> None:
        check_kept(found)
        check_transposed(found)

    check_caught(mutant, check, tmp_path)
