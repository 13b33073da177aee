"""The kernels of casts_fused.py, where their maths, bytes and launches stand.

Largest values are the bits of absolute values, int32. EXPONENT, MANTISSA and MOST are those of the largest value of the 8-bit format.
"""

import triton
import triton.language as tl

from automodel_accel.kernels.fp8_linear import scaling

BITS, NOT_FINITE = tl.constexpr(scaling.MANTISSA_BITS), tl.constexpr(scaling.NOT_FINITE)
LEAST_BIASED, FRACTION = tl.constexpr(scaling.LEAST), tl.constexpr(scaling.MANTISSA)


@triton.jit
def magnitude(x):
    """The bits of |x|, which order as the values do, and NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(amax, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """The scale and its inverse, of the bits of a largest value; an infinite one has the inverse 0."""
    exponent = (amax >> BITS) & NOT_FINITE  # a NaN may have a sign
    mantissa = amax & FRACTION
    biased = tl.maximum(exponent - EXPONENT + (mantissa > MANTISSA).to(tl.int32), LEAST_BIASED)
    finite = exponent != NOT_FINITE
    scale = tl.where(finite, biased << BITS, amax)
    inverse = tl.where(finite, (254 - biased) << BITS, tl.where(mantissa == 0, 0, amax))
    return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def saturated(x, inside, MOST: tl.constexpr):
    """Zero outside, where an inverse that is NaN has made NaN of it."""
    return tl.where(inside, tl.clamp(x, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL), 0.0)


@triton.jit
def amax_kernel(
    X,
    AMAX_P,
    n_tiles,
    tiles_per_row,
    n_cols,
    stride_x,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    zero = tl.full((), 0, tl.int64)  # offsets pass 2^31 elements
    amax = tl.zeros((BLOCK,), dtype=tl.int32)
    for tile in tl.range(tl.program_id(0), n_tiles, PROGRAMS, num_stages=STAGES):
        row = (zero + tile) // tiles_per_row
        cols = (zero + tile) % tiles_per_row * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride_x + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, magnitude(x))
    tl.store(AMAX_P + tl.program_id(0), tl.max(amax, 0))


@triton.jit
def amax_sides_kernel(
    X,
    AMAX_ROWS,
    AMAX_COLS,
    COL_FACTOR,
    ROW_FACTOR,
    n_rows,
    n_cols,
    stride_x,
    stride_rows,
    stride_cols,
    OF_ROWS: tl.constexpr,
    OF_COLS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    chunk = tl.program_id(1).to(tl.int64)
    at_rows = block * ROWS + tl.arange(0, ROWS)
    in_rows = at_rows < n_rows
    of_rows = tl.zeros((ROWS, COLS), dtype=tl.int32)
    if OF_COLS:
        row_factor = tl.load(ROW_FACTOR + at_rows, mask=in_rows, other=0.0)
    for step in range(STEPS):
        at_cols = (chunk * STEPS + step) * COLS + tl.arange(0, COLS)
        in_cols = at_cols < n_cols
        at = at_rows[:, None] * stride_x + at_cols[None, :]
        x = tl.load(X + at, mask=in_rows[:, None] & in_cols[None, :], other=0.0).to(tl.float32)
        if OF_ROWS:
            factored = x
            if HAS_FACTOR:
                factored = x * tl.load(COL_FACTOR + at_cols, mask=in_cols, other=0.0)[None, :]
            of_rows = tl.maximum(of_rows, magnitude(factored))
        if OF_COLS:
            largest = tl.max(magnitude(x * row_factor[:, None]), 0)
            tl.store(AMAX_COLS + block * stride_cols + at_cols, largest, mask=in_cols)
    if OF_ROWS:
        tl.store(AMAX_ROWS + chunk * stride_rows + at_rows, tl.max(of_rows, 1), mask=in_rows)


@triton.jit
def largest_partial(PARTIAL, AMAX, block, n_partials, length, PARTIALS: tl.constexpr, COLS: tl.constexpr):
    cols = block * COLS + tl.arange(0, COLS)
    inside = cols < length
    amax = tl.zeros((PARTIALS, COLS), dtype=tl.int32)
    for first in range(0, n_partials, PARTIALS):
        partial = (first + tl.arange(0, PARTIALS)).to(tl.int64)
        mask = (partial < n_partials)[:, None] & inside[None, :]
        amax = tl.maximum(amax, tl.load(PARTIAL + partial[:, None] * length + cols[None, :], mask=mask, other=0))
    tl.store(AMAX + cols, tl.max(amax, 0), mask=inside)


@triton.jit
def largest_partials_kernel(
    PARTIAL_ROWS,
    PARTIAL_COLS,
    AMAX_ROWS,
    AMAX_COLS,
    of_rows,
    of_cols,
    n_rows,
    n_cols,
    row_blocks,
    OF_ROWS: tl.constexpr,
    OF_COLS: tl.constexpr,
    PARTIALS: tl.constexpr,
    COLS: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < row_blocks:
        if OF_ROWS:
            largest_partial(PARTIAL_ROWS, AMAX_ROWS, pid, of_rows, n_rows, PARTIALS, COLS)
    else:
        if OF_COLS:
            largest_partial(PARTIAL_COLS, AMAX_COLS, pid - row_blocks, of_cols, n_cols, PARTIALS, COLS)


@triton.jit
def cast_rows_kernel(
    X,
    COL_FACTOR,
    Q,
    SCALE,
    n_rows,
    n_cols,
    stride_x,
    stride_q,
    HAS_FACTOR: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    in_row = cols < n_cols
    zero = tl.full((), 0, tl.int64)  # row offsets pass 2^31 elements
    if HAS_FACTOR:
        factor = tl.load(COL_FACTOR + cols, mask=in_row, other=0.0)
    for row in tl.range(tl.program_id(0), n_rows, PROGRAMS, num_stages=STAGES):
        start = zero + row
        x = tl.load(X + start * stride_x + cols, mask=in_row, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            x = x * factor
        scale, inverse = scale_of(tl.max(magnitude(x), 0), EXPONENT, MANTISSA)
        q = saturated(x * inverse, in_row, MOST).to(Q.dtype.element_ty)
        tl.store(Q + start * stride_q + cols, q, mask=in_row)
        tl.store(SCALE + row, scale)


@triton.jit
def cast_tiles_kernel(
    X,
    Q,
    Q_T,
    AMAX,
    AMAX_COLS,
    COL_FACTOR,
    ROW_FACTOR,
    SCALE,
    SCALE_COLS,
    n_tiles,
    tiles_per_row,
    n_rows,
    n_cols,
    n_padded,
    n_partials,
    stride_x,
    stride_q,
    stride_q_t,
    SERVES: tl.constexpr,
    STRAIGHT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    MOST: tl.constexpr,
    PARTIALS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    zero = tl.full((), 0, tl.int64)  # offsets pass 2^31 elements
    if SERVES == "all":
        partials = tl.arange(0, PARTIALS)
        amax = tl.max(tl.load(AMAX + partials, mask=partials < n_partials, other=0), 0)
        scale, inverse = scale_of(amax, EXPONENT, MANTISSA)
        if tl.program_id(0) == 0:
            tl.store(SCALE, scale)
    for tile in tl.range(tl.program_id(0), n_tiles, PROGRAMS, num_stages=STAGES):
        row_tile = (zero + tile) // tiles_per_row
        col_tile = (zero + tile) % tiles_per_row
        rows = row_tile * ROWS + tl.arange(0, ROWS)
        cols = col_tile * COLS + tl.arange(0, COLS)
        in_rows = rows < n_rows
        in_cols = cols < n_cols
        at = rows[:, None] * stride_x + cols[None, :]
        inside = in_rows[:, None] & in_cols[None, :]
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        if STRAIGHT or SERVES != "gradients":
            if SERVES == "all":
                scaled = x * inverse
            else:
                amax = tl.load(AMAX + rows, mask=in_rows, other=0)
                scale, inverse = scale_of(amax, EXPONENT, MANTISSA)
                if col_tile == 0:
                    tl.store(SCALE + rows, scale, mask=in_rows)
                if SERVES == "gradients":
                    x_factored = x * tl.load(COL_FACTOR + cols, mask=in_cols, other=0.0)[None, :]
                    scaled = x_factored * inverse[:, None]
                else:
                    scaled = x * inverse[:, None]
            q = saturated(scaled, in_rows[:, None], MOST).to(Q.dtype.element_ty)
            if STRAIGHT:
                tl.store(Q + rows[:, None] * stride_q + cols[None, :], q, mask=inside)
        if TRANSPOSED:
            if SERVES == "gradients":
                amax = tl.load(AMAX_COLS + cols, mask=in_cols, other=0)
                scale, inverse = scale_of(amax, EXPONENT, MANTISSA)
                if row_tile == 0:
                    tl.store(SCALE_COLS + cols, scale, mask=in_cols)
                x_factored = x * tl.load(ROW_FACTOR + rows, mask=in_rows, other=0.0)[:, None]
                q = saturated(x_factored * inverse[None, :], in_rows[:, None], MOST).to(Q.dtype.element_ty)
            at = cols[:, None] * stride_q_t + rows[None, :]
            tl.store(Q_T + at, tl.trans(q), mask=in_cols[:, None] & (rows < n_padded)[None, :])


@triton.jit
def transpose_kernel(
    X,
    X_T,
    tiles_per_row,
    n_rows,
    n_cols,
    n_padded,
    stride_x,
    stride_x_t,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    rows = tile // tiles_per_row * ROWS + tl.arange(0, ROWS)
    cols = tile % tiles_per_row * COLS + tl.arange(0, COLS)
    in_cols = cols < n_cols
    at = rows[:, None] * stride_x + cols[None, :]
    x = tl.load(X + at, mask=(rows < n_rows)[:, None] & in_cols[None, :], other=0)
    at = cols[:, None] * stride_x_t + rows[None, :]
    tl.store(X_T + at, tl.trans(x), mask=in_cols[:, None] & (rows < n_padded)[None, :])
