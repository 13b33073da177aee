"""Plausible mistakes in casts to 8 bits by Triton; none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

KERNELS = "fp8_linear/fused.py"
HOST = "fp8_linear/casts_fused.py"

MUTANTS = (
    Mutant(
        KERNELS,
        "return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF",
        "return x.to(tl.int32, bitcast=True)",
        "negative values are never the largest",
    ),
    Mutant(KERNELS, "(amax >> BITS) & NOT_FINITE", "(amax >> BITS)", "a negative NaN is a number"),
    Mutant(KERNELS, "exponent - EXPONENT +", "exponent - EXPONENT - 1 +", "half the scale"),
    Mutant(KERNELS, "mantissa > MANTISSA", "mantissa >= MANTISSA", "twice the scale of what fits exactly"),
    Mutant(KERNELS, "mantissa > MANTISSA", "mantissa > FRACTION", "the mantissa of the largest value forgotten"),
    Mutant(KERNELS, ".to(tl.int32), LEAST_BIASED)", ".to(tl.int32), 1)", "scales below the least"),
    Mutant(KERNELS, "exponent != NOT_FINITE", "exponent != 0", "infinities and NaN have a scale as others"),
    Mutant(KERNELS, "(254 - biased) << BITS", "(253 - biased) << BITS", "half the inverse"),
    Mutant(KERNELS, "tl.where(mantissa == 0, 0, amax)", "amax", "the inverse of infinity is infinite"),
    Mutant(KERNELS, "tl.where(mantissa == 0, 0, amax)", "0", "the inverse of NaN is 0"),
    Mutant(KERNELS, "tl.clamp(x, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)", "x", "no clamp"),
    Mutant(KERNELS, "tl.clamp(x, -MOST,", "tl.clamp(x, -MOST / 2,", "a clamp of half the range"),
    Mutant(KERNELS, "PropagateNan.ALL", "PropagateNan.NONE", "the clamp makes numbers of NaN"),
    Mutant(KERNELS, "tl.where(inside, tl.clamp", "tl.where(inside | True, tl.clamp", "NaN in what is padded"),
    Mutant(
        KERNELS, "amax = tl.maximum(amax, magnitude(x))", "amax = magnitude(x)", "the largest of a program's last tile"
    ),
    Mutant(KERNELS, "row = (zero + tile) // tiles_per_row\n", "row = zero\n", "the largest of the first row"),
    Mutant(KERNELS, "% tiles_per_row * BLOCK + ", "* 0 + ", "the largest of the first tile of each row"),
    Mutant(
        KERNELS,
        "factored = x * tl.load(COL_FACTOR + at_cols, mask=in_cols, other=0.0)[None, :]",
        "factored = x",
        "the largest of a row without its columns' factors",
    ),
    Mutant(
        KERNELS,
        "magnitude(x * row_factor[:, None])",
        "magnitude(x)",
        "the largest of a column without its rows' factors",
    ),
    Mutant(
        KERNELS,
        "of_rows = tl.maximum(of_rows, magnitude(factored))",
        "of_rows = magnitude(factored)",
        "the largest of a chunk's last step",
    ),
    Mutant(KERNELS, "(chunk * STEPS + step) * COLS", "(chunk + step) * COLS", "chunks of one step"),
    Mutant(KERNELS, "AMAX_COLS + block * stride_cols", "AMAX_COLS", "partial maxima of columns overwritten"),
    Mutant(KERNELS, "AMAX_ROWS + chunk * stride_rows", "AMAX_ROWS", "partial maxima of rows overwritten"),
    Mutant(
        KERNELS,
        "amax = tl.maximum(amax, tl.load(PARTIAL",
        "amax = (tl.load(PARTIAL",
        "the largest of the last partials",
    ),
    Mutant(
        KERNELS, "AMAX_COLS, pid - row_blocks, of_cols", "AMAX_COLS, pid, of_cols", "the first columns are left out"
    ),
    Mutant(KERNELS, "            x = x * factor\n", "            x = x\n", "whole rows without their columns' factors"),
    Mutant(KERNELS, "X + start * stride_x", "X + start * n_cols", "whole rows taken for contiguous"),
    Mutant(KERNELS, "mask=partials < n_partials", "mask=partials < 1", "the largest of the first program"),
    Mutant(
        KERNELS,
        "at = rows[:, None] * stride_x + cols[None, :]\n        inside",
        "at = rows[:, None] * n_cols + cols[None, :]\n        inside",
        "tiles taken for contiguous",
    ),
    Mutant(KERNELS, "if col_tile == 0:", "if col_tile == 1:", "no scale of a narrow row"),
    Mutant(KERNELS, "if row_tile == 0:", "if row_tile == 2:", "no scale of a short column"),
    Mutant(
        KERNELS,
        "x_factored = x * tl.load(COL_FACTOR + cols, mask=in_cols, other=0.0)[None, :]",
        "x_factored = x",
        "the factors of columns forgotten",
    ),
    Mutant(
        KERNELS,
        "x_factored = x * tl.load(ROW_FACTOR + rows, mask=in_rows, other=0.0)[:, None]",
        "x_factored = x",
        "the factors of rows forgotten",
    ),
    Mutant(KERNELS, "scaled = x * inverse[:, None]", "scaled = x * inverse[None, :]", "the scale of another row"),
    Mutant(KERNELS, "x_factored * inverse[None, :]", "x_factored * inverse[:, None]", "the scale of another column"),
    Mutant(KERNELS, "Q + rows[:, None] * stride_q +", "Q + rows[:, None] * n_cols +", "gradients not side by side"),
    Mutant(KERNELS, "cols[:, None] * stride_q_t +", "cols[:, None] * n_padded +", "weights overwritten in q_t"),
    Mutant(KERNELS, "tl.store(Q_T + at, tl.trans(q)", "tl.store(Q_T + at, q", "not transposed"),
    Mutant(
        KERNELS,
        "tl.trans(q), mask=in_cols[:, None] & (rows < n_padded)",
        "tl.trans(q), mask=in_cols[:, None] & (rows < n_rows)",
        "padding of a cast left as it was",
    ),
    Mutant(KERNELS, "tl.store(X_T + at, tl.trans(x)", "tl.store(X_T + at, x", "8 bits not transposed"),
    Mutant(
        KERNELS,
        "tl.trans(x), mask=in_cols[:, None] & (rows < n_padded)",
        "tl.trans(x), mask=in_cols[:, None] & (rows < n_rows)",
        "padding of a transpose left as it was",
    ),
    Mutant(
        KERNELS,
        "at = rows[:, None] * stride_x + cols[None, :]\n    x = ",
        "at = rows[:, None] * n_cols + cols[None, :]\n    x = ",
        "8 bits taken for contiguous",
    ),
    Mutant(HOST, "whole[first:], scale[first:])", "whole[first:], scale)", "scales of several tensors in one place"),
    Mutant(HOST, "_from(amax, first) if rowwise else amax", "amax", "the largest values of other rows"),
    Mutant(HOST, "given if amax_R is None else [amax_R[None]]", "given", "known largest values unused"),
    Mutant(HOST, "            amax[first:],\n", "            amax,\n", "partial maxima of several tensors overwritten"),
    Mutant(HOST, "first : end if end < n_rows else None", "first:end", "the last tensor's padding left as it was"),
    Mutant(HOST, "_OfColumns(_from(weight_scale, first)", "_OfColumns(weight_scale", "factors of other columns"),
    Mutant(HOST, "_from(col_factor, first),", "col_factor,", "largest values with factors of other columns"),
    Mutant(HOST, "_from(amax_F, first)", "amax_F", "largest values of other columns"),
    Mutant(HOST, "        chunk += size\n", "", "partial maxima of gradients side by side overwritten"),
)
