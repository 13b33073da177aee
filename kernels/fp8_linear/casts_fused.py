"""The casts of casts.py in Triton, bit for bit: the largest absolute values in one pass, cast and transpose in another.

    scale = 2^ceil(log2(amax / max))      q = round(clamp(x / scale, +-max))      q_t = q^T, columns padded with zeros to 16 n

Largest values are compared as the bits of |x|, integers: an infinity is less than a NaN, which wins. The scale and its inverse come
of those bits by whole numbers alone, so that nothing waits for the host and nothing is rounded.

Bytes an element of x in 2 bytes, which are the floor of their passes; beyond them a few for each row, and for each column of a block
of 128 rows:
    one scale for all             read 2, then read 2 and write 1 for q, 1 for q_t
    one for each row              read 2, write 1 for q: a program holds the row; then for q_t read 1, write 1
    ... of more than 16384 columns, or of gradients for both products: as with one scale for all
    largest values known          read 2, write 1 for q, 1 for q_t
Launches, of k tensors: one scale for all 2 k; one for each row k, and 1 if transposed; of rows too long for one program, and of
gradients (but for one, for the input's product alone: 1) 2 k + 1; largest values known k, and 1 if one scale serves all.
`transposed` 1. Rows of no unit stride are copied first. No atomics: partial maxima are reduced by what reads them, or by one launch.
Shapes and letters as in casts.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from automodel_accel.kernels.fp8_linear import casts, scaling
from automodel_accel.kernels.fp8_linear.casts import Cast
from automodel_accel.kernels.fp8_linear.fused import (
    amax_kernel,
    amax_sides_kernel,
    cast_rows_kernel,
    cast_tiles_kernel,
    largest_partials_kernel,
    transpose_kernel,
)
from automodel_accel.kernels.launch import cdiv, next_power_of_2, persistent_programs, prefetch_stages, row_warps, rows

PROGRAMS_PER_PROCESSOR = 2
LONGEST_ROW = 16384  # that a program holds
FLAT = 4096  # elements of one step of the largest value of all
TILE_ROWS, TILE_COLS = 128, 128  # of a cast and its transpose: whole lines of 128 bytes in both
SIDE_ROWS, SIDE_COLS, SIDE_STEPS = 128, 64, 16  # of the largest values of rows and columns at once
PARTIALS, PARTIAL_COLS = 64, 32
WARPS = 8
STAGES = 2  # of a cast: the next tile is on its way


def cast_rows(
    tensors: Sequence[torch.Tensor],
    dtype: torch.dtype,
    rowwise: bool,
    *,
    straight: bool = True,
    transposed: bool = False,
    amax_R: torch.Tensor | None = None,
) -> Cast:
    """As casts.cast_rows."""
    given = [rows(x) for x in tensors if x.numel()]
    if not given:
        return casts.cast_rows(tensors, dtype, rowwise, straight=straight, transposed=transposed, amax_R=amax_R)
    n_rows, n_cols, like = sum(map(len, given)), given[0].shape[1], given[0]
    scale = _floats(like, n_rows if rowwise else None)
    amax: torch.Tensor | None
    if rowwise and amax_R is None and n_cols <= LONGEST_ROW:
        whole = like.new_empty(n_rows, n_cols, dtype=dtype)
        for x, first in _placed(given, 0):
            _cast_rows(x, None, whole[first:], scale[first:])
        return Cast(whole if straight else None, _transposed(whole) if transposed else None, scale[:, None])
    if not rowwise:
        amax = _largest(given if amax_R is None else [amax_R[None]])
    elif amax_R is None:
        amax = _sides(given, 0, True, None, None)[0]
    else:
        amax = amax_R.contiguous().view(torch.int32)
    q, q_t = _outputs(like, n_rows, n_cols, dtype, straight or not transposed, transposed)
    for x, first in _placed(given, 0):
        end = first + len(x)
        _cast_tiles(
            x,
            dtype,
            _from(q, first),
            None if q_t is None else q_t[:, first : end if end < n_rows else None],
            _from(amax, first) if rowwise else amax,
            scale[first:] if rowwise else scale,
        )
    return Cast(q if straight else None, q_t, scale[:, None] if rowwise else scale)


def cast_gradients(
    gradients: Sequence[torch.Tensor],
    dtype: torch.dtype,
    rowwise: bool,
    *,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
) -> tuple[Cast | None, Cast | None]:
    """As casts.cast_gradients."""
    given = [rows(g) for g in gradients if g.numel()]
    if not given or (weight_scale is None and x_scale is None):
        return casts.cast_gradients(gradients, dtype, rowwise, weight_scale=weight_scale, x_scale=x_scale)
    n_rows, n_cols, like = len(given[0]), sum(g.shape[1] for g in given), given[0]
    straight, transposed = weight_scale is not None, x_scale is not None
    weight_scale, x_scale = (None if one is None else one.contiguous() for one in (weight_scale, x_scale))
    q, q_t = _outputs(like, n_rows, n_cols, dtype, straight, transposed)
    scale, scale_F = _floats(like, n_rows if rowwise else None), None
    if not rowwise:
        amax = _largest(given)
        for g, first in _placed(given, 1):
            _cast_tiles(g, dtype, _from(q, first, 1), _from(q_t, first), amax, scale)
    elif q is not None and not transposed and len(given) == 1 and n_cols <= LONGEST_ROW:
        _cast_rows(given[0], weight_scale, q, scale)
    else:
        scale_F = _floats(like, n_cols)
        amax_N, amax_F = _sides(given, 1, straight, weight_scale, x_scale)
        for g, first in _placed(given, 1):
            of_columns = _OfColumns(_from(weight_scale, first), x_scale, _from(amax_F, first), scale_F[first:])
            _cast_tiles(g, dtype, _from(q, first, 1), _from(q_t, first), amax_N, scale, of_columns)
        scale_F = scale_F[:, None]
    of_input = Cast(q, None, scale[:, None] if rowwise else scale)
    of_weights = Cast(None, q_t, scale if scale_F is None else scale_F)
    return of_input if straight else None, of_weights if transposed else None


def transposed(q_RC: torch.Tensor) -> torch.Tensor:
    """As casts.transposed."""
    return _transposed(q_RC)


@dataclass(frozen=True, slots=True)
class _OfColumns:
    """What a cast of gradients knows of its columns, and the factors of both of its products."""

    col_factor: torch.Tensor | None
    row_factor: torch.Tensor | None
    amax: torch.Tensor | None
    scale: torch.Tensor


def _largest(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Bits of the largest values of each program."""
    programs = persistent_programs(tensors[0].device, PROGRAMS_PER_PROCESSOR)
    shapes = [(1, x.numel()) if x.is_contiguous() else tuple(x.shape) for x in tensors]
    tiles = [n_rows * cdiv(n_cols, FLAT) for n_rows, n_cols in shapes]
    amax = torch.empty(sum(min(programs, n) for n in tiles), dtype=torch.int32, device=tensors[0].device)
    first = 0
    for x, (_, n_cols), n_tiles in zip(tensors, shapes, tiles, strict=True):
        amax_kernel[(min(programs, n_tiles),)](
            x,
            amax[first:],
            n_tiles,
            cdiv(n_cols, FLAT),
            n_cols,
            x.stride(0),
            BLOCK=FLAT,
            PROGRAMS=min(programs, n_tiles),
            STAGES=prefetch_stages(FLAT * x.element_size()),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        first += min(programs, n_tiles)
    return amax


def _sides(
    tensors: Sequence[torch.Tensor],
    dim: int,
    of_rows: bool,
    col_factor: torch.Tensor | None,
    row_factor: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Bits of the largest value of each row, times the factor of its column, and of each column, times that of its row.

    The tensors stand one below the other (dim 0, no columns asked for) or side by side (dim 1).
    """
    like, sizes = tensors[0], [cdiv(x.shape[1], SIDE_COLS * SIDE_STEPS) for x in tensors]
    n_rows = sum(map(len, tensors)) if dim == 0 else len(like)
    n_cols = like.shape[1] if dim == 0 else sum(x.shape[1] for x in tensors)
    chunks = sizes[0] if dim == 0 else sum(sizes)
    blocks = cdiv(n_rows, SIDE_ROWS)
    partial_rows = like.new_empty(chunks, n_rows, dtype=torch.int32) if of_rows else None
    partial_cols = None if row_factor is None else like.new_empty(blocks, n_cols, dtype=torch.int32)
    chunk = 0
    for (x, first), size in zip(_placed(tensors, dim), sizes, strict=True):
        amax_sides_kernel[(cdiv(len(x), SIDE_ROWS), size)](
            x,
            _from(partial_rows, first, 1) if dim == 0 else _from(partial_rows, chunk),
            _from(partial_cols, first, 1),
            _from(col_factor, first),
            row_factor,
            *x.shape,
            x.stride(0),
            n_rows,
            n_cols,
            OF_ROWS=of_rows,
            OF_COLS=row_factor is not None,
            HAS_FACTOR=col_factor is not None,
            ROWS=SIDE_ROWS,
            COLS=SIDE_COLS,
            STEPS=SIDE_STEPS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        chunk += size
    amax_rows = like.new_empty(n_rows, dtype=torch.int32) if of_rows else None
    amax_cols = None if row_factor is None else like.new_empty(n_cols, dtype=torch.int32)
    row_blocks = cdiv(n_rows, PARTIAL_COLS) if of_rows else 0
    col_blocks = 0 if row_factor is None else cdiv(n_cols, PARTIAL_COLS)
    largest_partials_kernel[(row_blocks + col_blocks,)](
        partial_rows,
        partial_cols,
        amax_rows,
        amax_cols,
        chunks,
        blocks,
        n_rows,
        n_cols,
        row_blocks,
        OF_ROWS=of_rows,
        OF_COLS=row_factor is not None,
        PARTIALS=PARTIALS,
        COLS=PARTIAL_COLS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return amax_rows, amax_cols


def _cast_rows(x: torch.Tensor, col_factor: torch.Tensor | None, q: torch.Tensor, scale: torch.Tensor) -> None:
    """Write the cast of whole rows, and a scale for each, into the last two."""
    n_rows, n_cols = x.shape
    block = next_power_of_2(n_cols)
    programs = min(n_rows, persistent_programs(x.device, PROGRAMS_PER_PROCESSOR))
    exponent, mantissa = scaling.parts_of_largest(q.dtype)
    cast_rows_kernel[(programs,)](
        x,
        col_factor,
        q,
        scale,
        n_rows,
        n_cols,
        x.stride(0),
        q.stride(0),
        HAS_FACTOR=col_factor is not None,
        EXPONENT=exponent,
        MANTISSA=mantissa,
        MOST=torch.finfo(q.dtype).max,
        BLOCK=block,
        PROGRAMS=programs,
        STAGES=prefetch_stages(block * x.element_size()),
        num_warps=row_warps(block // 2),  # 16 elements a thread: 16 bytes of q
        enable_fp_fusion=True,
    )


def _cast_tiles(
    x: torch.Tensor,
    dtype: torch.dtype,
    q: torch.Tensor | None,
    q_t: torch.Tensor | None,
    amax: torch.Tensor | None,
    scale: torch.Tensor,
    of_columns: _OfColumns | None = None,
) -> None:
    """Write the cast and its transpose, where there is one, and the scales."""
    n_rows, n_cols = x.shape
    n_padded = n_rows if q_t is None else q_t.shape[1]
    tiles_per_row = cdiv(n_cols, TILE_COLS)
    n_tiles = cdiv(n_padded, TILE_ROWS) * tiles_per_row
    programs = min(n_tiles, persistent_programs(x.device, PROGRAMS_PER_PROCESSOR))
    n_partials = 0 if scale.dim() or amax is None else len(amax)
    exponent, mantissa = scaling.parts_of_largest(dtype)
    columns = of_columns or _OfColumns(None, None, None, scale)
    cast_tiles_kernel[(programs,)](
        x,
        q_t if q is None else q,  # for its dtype
        q_t,
        amax,
        columns.amax,
        columns.col_factor,
        columns.row_factor,
        scale,
        columns.scale,
        n_tiles,
        tiles_per_row,
        n_rows,
        n_cols,
        n_padded,
        n_partials,
        x.stride(0),
        0 if q is None else q.stride(0),
        0 if q_t is None else q_t.stride(0),
        SERVES="all" if not scale.dim() else "rows" if of_columns is None else "gradients",
        STRAIGHT=q is not None,
        TRANSPOSED=q_t is not None,
        EXPONENT=exponent,
        MANTISSA=mantissa,
        MOST=torch.finfo(dtype).max,
        PARTIALS=next_power_of_2(n_partials),
        ROWS=TILE_ROWS,
        COLS=TILE_COLS,
        PROGRAMS=programs,
        STAGES=STAGES,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def _transposed(q: torch.Tensor) -> torch.Tensor:
    n_rows, n_cols = q.shape
    q_t = q.new_empty(n_cols, cdiv(n_rows, casts.ROWS) * casts.ROWS)
    if q_t.numel():
        q = rows(q)
        tiles_per_row = cdiv(n_cols, TILE_COLS)
        transpose_kernel[(cdiv(q_t.shape[1], TILE_ROWS) * tiles_per_row,)](
            q.view(torch.uint8),
            q_t.view(torch.uint8),
            tiles_per_row,
            n_rows,
            n_cols,
            q_t.shape[1],
            q.stride(0),
            q_t.stride(0),
            ROWS=TILE_ROWS,
            COLS=TILE_COLS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return q_t


def _outputs(
    like: torch.Tensor, n_rows: int, n_cols: int, dtype: torch.dtype, straight: bool, transposed: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    padded = cdiv(n_rows, casts.ROWS) * casts.ROWS
    q = like.new_empty(n_rows, n_cols, dtype=dtype) if straight else None
    return q, like.new_empty(n_cols, padded, dtype=dtype) if transposed else None


def _floats(like: torch.Tensor, size: int | None) -> torch.Tensor:
    return like.new_empty(() if size is None else (size,), dtype=torch.float32)


def _placed(tensors: Sequence[torch.Tensor], dim: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Each tensor, and where it begins among them all."""
    first = 0
    for x in tensors:
        yield x, first
        first += x.shape[dim]


def _from(x: torch.Tensor | None, first: int, dim: int = 0) -> torch.Tensor | None:
    return None if x is None else x.narrow(dim, first, x.shape[dim] - first)
