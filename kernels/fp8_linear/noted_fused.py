"""What a kernel adds to note its output for a cast to 8 bits (noted.py), once it holds a row of it, or a tile."""

import triton
import triton.language as tl

from automodel_accel.kernels.fp8_linear import scaling

BITS, NOT_FINITE = tl.constexpr(scaling.MANTISSA_BITS), tl.constexpr(scaling.NOT_FINITE)
ALL_MANTISSA, LEAST_BIASED = tl.constexpr(scaling.MANTISSA), tl.constexpr(scaling.LEAST)


@triton.jit
def magnitude(x):
    """The bits of |x|, float32: their order is that of the values, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(amax, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """The scale and its inverse, of the bits of a largest value, for a format whose largest value has these parts.

    Of infinity the inverse is 0, of NaN it is NaN.
    """
    exponent = amax >> BITS
    mantissa = amax & ALL_MANTISSA
    biased = tl.maximum(exponent - EXPONENT + (mantissa > MANTISSA).to(tl.int32), LEAST_BIASED)
    finite = exponent != NOT_FINITE
    scale = tl.where(finite, biased << BITS, amax)
    inverse = tl.where(finite, (254 - biased) << BITS, tl.where(mantissa == 0, 0, amax))
    return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def note_row(
    y,
    Y,
    in_row,
    cols,
    row,
    n_cols,
    AMAX,
    Q,
    SCALE,
    HAS_Q: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    """Store the largest |y| of a row, rounded as Y keeps it, to AMAX (its bits); where HAS_Q, the cast and its scale too.

    y: [C] float32. No cast value passes the largest one of its format: the scale is of the row's own.
    """
    y = y.to(Y.dtype.element_ty).to(tl.float32)
    amax = tl.max(tl.where(in_row, magnitude(y), 0), 0)
    tl.store(AMAX + row, amax)
    if HAS_Q:
        scale, inverse = scale_of(amax, EXPONENT, MANTISSA)
        tl.store(SCALE + row, scale)
        tl.store(Q + row * n_cols + cols, (y * inverse).to(Q.dtype.element_ty), mask=in_row)
