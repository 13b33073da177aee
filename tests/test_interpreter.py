"""The repaired interpreter computes bfloat16, and casts to 8 bits, as torch does, bit for bit."""

import pytest
import torch

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here", allow_module_level=True)

import triton.language as tl
from triton.runtime.errors import InterpreterError

SIZE = 4096


@triton.jit
def cast_kernel(X, OUT, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(OUT + at, tl.load(X + at).to(OUT.dtype.element_ty))


@triton.jit
def binary_kernel(A, B, OUT, OP: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(A + at)
    b = tl.load(B + at)
    if OP == "add":
        out = a + b
    elif OP == "sub":
        out = a - b
    elif OP == "mul":
        out = a * b
    elif OP == "maximum":
        out = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "where":
        out = tl.where(a > b, a, b)
    else:
        out = -a
    tl.store(OUT + at, out)


@triton.jit
def dot_kernel(A, B, OUT, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(OUT + at, tl.dot(tl.load(A + at), tl.load(B + at)))


@triton.jit
def reduce_kernel(A, OUT, OP: tl.constexpr, SIZE: tl.constexpr):
    a = tl.load(A + tl.arange(0, SIZE))
    if OP == "sum":
        tl.store(OUT, tl.sum(a, 0))
    else:
        tl.store(OUT, tl.max(a, 0))


def operands(seed: int) -> torch.Tensor:
    """Random bit patterns: every exponent, both zeros, subnormals, infinities and NaN."""
    bits = torch.randint(-(2**15), 2**15, (SIZE,), generator=torch.Generator().manual_seed(seed), dtype=torch.int16)
    return bits.view(torch.bfloat16)


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal bits, and NaN in the same places (whose payload torch itself does not fix)."""
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours.isnan(), theirs.isnan())
    integer = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    real = ~theirs.isnan()
    assert torch.equal(ours[real].view(integer), theirs[real].view(integer))


def ties() -> torch.Tensor:
    """Float32 values whose lower half is around one half of a bfloat16 unit."""
    low = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32).repeat(SIZE)[:SIZE]
    return ((operands(0).view(torch.int16).to(torch.int32) << 16) | low).view(torch.float32)


@pytest.mark.parametrize(
    "source", [ties(), operands(1), operands(1).to(torch.float16), torch.arange(SIZE, dtype=torch.int32)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cast(source: torch.Tensor, dtype: torch.dtype) -> None:
    out = torch.empty(SIZE, dtype=dtype)
    cast_kernel[(1,)](source, out, SIZE)
    assert_same_bits(out, source.to(dtype))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "maximum", "where", "neg"])
def test_arithmetic(name: str) -> None:
    a, b = operands(2), operands(3)
    expected = {"where": lambda a, b: torch.where(a > b, a, b), "neg": lambda a, b: -a}.get(name) or getattr(
        torch, name
    )
    out = torch.empty_like(a)
    binary_kernel[(1,)](a, b, out, name, SIZE)
    assert_same_bits(out, expected(a, b))


def test_dot_multiplies_values_and_not_bit_patterns() -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randint(-8, 9, (32, 32), generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, 32)
    assert torch.equal(out, a.float() @ b.float())  # small integers: exact in any order


EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


def around_eight_bits(dtype: torch.dtype) -> torch.Tensor:
    """Each value of an 8-bit format, each tie between two, and float32's neighbours of these."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()].sort().values
    exact = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([-0.0, 1e-30, -1e-45])])
    up, down = (torch.nextafter(exact, torch.full_like(exact, to)) for to in (float("inf"), float("-inf")))
    most = torch.finfo(dtype).max
    every = torch.cat([exact, up, down]).clamp(-most, most)
    return torch.cat([every, torch.full((SIZE - len(every),), float("nan"))])


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_cast_to_8_bits(dtype: torch.dtype) -> None:
    source = torch.cat([around_eight_bits(dtype), torch.randn(SIZE, generator=torch.Generator().manual_seed(5))])
    for part in source.split(SIZE):
        out = torch.empty(SIZE, dtype=torch.uint8).view(dtype)
        cast_kernel[(1,)](part, out, SIZE)
        assert torch.equal(out.float().isnan(), part.isnan())
        real = ~part.isnan()
        assert torch.equal(out.view(torch.uint8)[real], part.to(dtype).view(torch.uint8)[real])


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_cast_to_8_bits_of_what_is_too_large(dtype: torch.dtype) -> None:
    """As the hardware's; torch's gives NaN or infinity."""
    most = torch.finfo(dtype).max
    source = torch.tensor([most * 1.5, -most * 1.5, 1e30, -1e30, float("inf"), -float("inf")]).repeat(SIZE)[:SIZE]
    out = torch.empty(SIZE, dtype=torch.uint8).view(dtype)
    cast_kernel[(1,)](source, out, SIZE)
    if dtype in EIGHT_BITS[:2]:
        assert torch.equal(out.float(), source.sign() * most)
    else:
        assert out.float().isnan().all()


def test_maximum_of_a_row() -> None:
    a, out = torch.linspace(-9, 2, SIZE).bfloat16(), torch.empty((), dtype=torch.bfloat16)
    reduce_kernel[(1,)](a, out, "max", SIZE)
    assert out == a.max()


def test_a_sum_of_raw_bfloat16_raises() -> None:
    with pytest.raises(InterpreterError, match="convert to float32 first"):
        reduce_kernel[(1,)](torch.ones(SIZE).bfloat16(), torch.empty((), dtype=torch.bfloat16), "sum", SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_uninitialised_memory_is_nan(dtype: torch.dtype) -> None:
    x = torch.zeros(3, dtype=dtype)
    for empty in (
        torch.empty(3, dtype=dtype),
        torch.empty_like(x),
        x.new_empty(3),
        torch.empty_strided((3,), (2,), dtype=dtype),
    ):
        assert empty.isnan().all()
