"""The casts of delayed.py in Triton, bit for bit: one launch for each tensor, which reads it once.

Bytes an element of x in 2 bytes, which are the floor: read 2, write 1 for q, 1 for q_t; beyond them 8 for each program, which the
next call's programs read. No atomics, no launch of their own: each program writes its part of the largest value and of the count;
at the next call every program finds the largest of these and of the ring, and one writes it into the ring.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from automodel_accel.kernels.fp8_linear import casts, casts_fused, delayed, scaling
from automodel_accel.kernels.fp8_linear.casts import Cast
from automodel_accel.kernels.fp8_linear.fused import magnitude, saturated, scale_of
from automodel_accel.kernels.fp8_linear.history import LENGTH, MARGIN, History
from automodel_accel.kernels.launch import cdiv, next_power_of_2, persistent_programs, rows

PROGRAMS_PER_PROCESSOR = 2
TILE_ROWS, TILE_COLS = 64, 128  # with 128 rows what is counted leaves registers for one program on a processor alone
WARPS = 8
STAGES = 2  # the next tile is on its way

BITS, NOT_FINITE = tl.constexpr(scaling.MANTISSA_BITS), tl.constexpr(scaling.NOT_FINITE)
FRACTION = tl.constexpr(scaling.MANTISSA)
INFINITE = tl.constexpr(scaling.NOT_FINITE << scaling.MANTISSA_BITS)
HEADROOM, RING = tl.constexpr(2.0**MARGIN), tl.constexpr(LENGTH)


def cast(
    tensors: Sequence[torch.Tensor],
    dtype: torch.dtype,
    history: History,
    *,
    straight: bool = True,
    transposed: bool = False,
    scale: torch.Tensor | None = None,
) -> Cast:
    """As delayed.cast."""
    if scale is None and history.is_empty(tensors[0].device):
        return delayed.first(casts_fused, tensors, dtype, history, straight, transposed)
    given = [rows(x) for x in tensors if x.numel()]
    if not given:
        return delayed.cast(tensors, dtype, history, straight=straight, transposed=transposed, scale=scale)
    like, n_rows, n_cols = given[0], len(given[0]), sum(x.shape[1] for x in given)
    n_padded = cdiv(n_rows, casts.ROWS) * casts.ROWS
    q = like.new_empty(n_rows, n_cols, dtype=dtype) if straight or not transposed else None
    q_t = like.new_empty(n_cols, n_padded, dtype=dtype) if transposed else None
    most = persistent_programs(like.device, PROGRAMS_PER_PROCESSOR)
    programs = [min(most, cdiv(n_padded, TILE_ROWS) * cdiv(x.shape[1], TILE_COLS)) for x in given]
    record = None if scale is not None else like.new_empty(2, sum(programs), dtype=torch.int32)
    scale = like.new_empty((), dtype=torch.float32) if scale is None else scale
    first_col = first_program = 0
    for x, count in zip(given, programs, strict=True):
        end = first_col + x.shape[1]
        part = None if record is None else record[:, first_program : first_program + count]
        of_q, of_q_t = None if q is None else q[:, first_col:end], None if q_t is None else q_t[first_col:end]
        _launch(x, of_q, of_q_t, scale, history, part, count, n_padded, folds=first_col == 0)
        first_col, first_program = end, first_program + count
    if record is not None:
        history.record(*record)
    return Cast(q if straight else None, q_t, scale)


def _launch(
    x: torch.Tensor,
    q: torch.Tensor | None,
    q_t: torch.Tensor | None,
    scale: torch.Tensor,
    history: History,
    part: torch.Tensor | None,
    programs: int,
    n_padded: int,
    folds: bool,
) -> None:
    like = q_t if q is None else q
    assert like is not None
    tiles_per_row, n_last = cdiv(x.shape[1], TILE_COLS), len(history.amax_P)
    exponent, mantissa = scaling.parts_of_largest(like.dtype)
    delayed_cast_kernel[(programs,)](
        x,
        like,
        q_t,
        scale,
        history.amaxes.view(torch.int32),
        history.total,
        history.amax_P,
        history.saturated_P,
        None if part is None else part[0],
        None if part is None else part[1],
        cdiv(n_padded, TILE_ROWS) * tiles_per_row,
        tiles_per_row,
        *x.shape,
        n_padded,
        n_last,
        history.slot,
        x.stride(0),
        0 if q is None else q.stride(0),
        0 if q_t is None else q_t.stride(0),
        RECORDS=part is not None,
        FOLDS=folds,
        STRAIGHT=q is not None,
        TRANSPOSED=q_t is not None,
        EXPONENT=exponent,
        MANTISSA=mantissa,
        MOST=torch.finfo(like.dtype).max,
        PARTIALS=next_power_of_2(n_last),
        ROWS=TILE_ROWS,
        COLS=TILE_COLS,
        PROGRAMS=programs,
        STAGES=STAGES,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


@triton.jit
def inverse_of(scale):
    """Of a power of two, by whole numbers; of infinity 0."""
    bits = magnitude(scale)
    finite = bits < INFINITE
    inverse = tl.where(finite, (254 - (bits >> BITS)) << BITS, tl.where((bits & FRACTION) == 0, 0, bits))
    return inverse.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n_last", "slot"])
def delayed_cast_kernel(
    X,
    Q,
    Q_T,
    SCALE,
    AMAXES,
    TOTAL,
    LAST_AMAX_P,
    LAST_SATURATED_P,
    AMAX_P,
    SATURATED_P,
    n_tiles,
    tiles_per_row,
    n_rows,
    n_cols,
    n_padded,
    n_last,
    slot,
    stride_x,
    stride_q,
    stride_q_t,
    RECORDS: tl.constexpr,
    FOLDS: tl.constexpr,
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
    if RECORDS:
        partials = tl.arange(0, PARTIALS)
        last = tl.max(tl.load(LAST_AMAX_P + partials, mask=partials < n_last, other=0), 0)
        ring = tl.arange(0, RING)
        amaxes = tl.load(AMAXES + ring)
        amaxes = tl.where((ring == slot) & (last < INFINITE), last, amaxes)  # whether or not it is written there by now
        largest = tl.max(amaxes, 0)
        scale, inverse = scale_of(largest, EXPONENT, MANTISSA)
        scale = tl.where(largest == 0, 1.0, scale * HEADROOM)
        if tl.program_id(0) == 0:
            tl.store(SCALE, scale)
            if FOLDS:
                count = tl.load(LAST_SATURATED_P + partials, mask=partials < n_last, other=0)
                tl.store(TOTAL, tl.load(TOTAL) + tl.sum(count.to(tl.int64), 0))
                tl.store(AMAXES + ring, amaxes, mask=ring == slot)
    else:
        scale = tl.load(SCALE)
    inverse = inverse_of(scale)
    amax = tl.zeros((ROWS,), dtype=tl.int32)
    over = tl.zeros((ROWS,), dtype=tl.int32)
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
        finite = magnitude(x) < INFINITE
        scaled = x * inverse
        if RECORDS:
            amax = tl.maximum(amax, tl.max(magnitude(x), 1))
            over += tl.sum((finite & (tl.abs(scaled) > MOST)).to(tl.int32), 1)
        q = saturated(tl.where(finite, scaled, float("nan")), in_rows[:, None], MOST).to(Q.dtype.element_ty)
        if STRAIGHT:
            tl.store(Q + rows[:, None] * stride_q + cols[None, :], q, mask=inside)
        if TRANSPOSED:
            at = cols[:, None] * stride_q_t + rows[None, :]
            tl.store(Q_T + at, tl.trans(q), mask=in_cols[:, None] & (rows < n_padded)[None, :])
    if RECORDS:
        tl.store(AMAX_P + tl.program_id(0), tl.max(amax, 0))
        tl.store(SATURATED_P + tl.program_id(0), tl.sum(over, 0))
