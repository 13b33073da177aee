"""What a kernel adds to note its output for a cast to 8 bits (noted.py), once it holds a row of it, or a tile."""

import triton
import triton.language as tl

from automodel_accel.kernels.fp8_linear.fused import magnitude, scale_of


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
