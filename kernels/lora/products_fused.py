"""The kernels of fused.py, where their maths, bytes and source stand.

Shapes: X and DX are [N, H] (n_rows, n_cols) with a row stride, A [R, H], B [F, R]; P and DP [N, C] with a row stride. Of three adapters
each has a rank, a first column in P (`start`) and columns there (`padded`), a factor and a probability of dropout; an absent one has
rank 0, and its pointers are not followed.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)  # of Philox: the fewest that pass every test of the source


@triton.jit
def words(seed, rows, cols, n_cols, FIRST: tl.constexpr):
    """Four random words for each element of a tile; elements are counted in 64 bits."""
    element = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
    low = (element & 0xFFFFFFFF).to(tl.uint32)
    high = (element >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + FIRST, zero, ROUNDS)


@triton.jit
def masked(x, word, dropout):
    return x * (tl.uint_to_uniform_float(word) >= dropout).to(x.dtype)  # NaN times 0 stays what it is in torch


@triton.jit
def project_one(total, x, A, rank, cols, n_cols, R: tl.constexpr, PRECISION: tl.constexpr):
    r = tl.arange(0, R)
    a = tl.load(A + r[:, None] * n_cols + cols[None, :], mask=(r < rank)[:, None] & (cols < n_cols)[None, :], other=0.0)
    return tl.dot(x, tl.trans(a.to(x.dtype)), total, input_precision=PRECISION)


@triton.jit
def store_one(P, p, rows, start, padded, stride, n_rows, R: tl.constexpr):
    r = tl.arange(0, R)
    mask = (rows < n_rows)[:, None] & (r < padded)[None, :]
    tl.store(P + rows.to(tl.int64)[:, None] * stride + (start + r)[None, :], p.to(P.dtype.element_ty), mask=mask)


@triton.jit
def copy_one(B, W, block, rank, start, n_rows, n_cols, stride_w, R: tl.constexpr, ROWS: tl.constexpr):
    rows = block * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, R)
    mask = (rows < n_rows)[:, None] & (r < rank)[None, :]
    b = tl.load(B + rows[:, None] * rank + r[None, :], mask=mask, other=0.0)
    beside = W + rows.to(tl.int64)[:, None] * stride_w + (n_cols + start + r)[None, :]
    tl.store(beside, b.to(W.dtype.element_ty), mask=mask)


@triton.jit
def project_kernel(
    X,
    P,
    A0,
    A1,
    A2,
    B0,
    B1,
    B2,
    W0,
    W1,
    W2,
    rank0,
    rank1,
    rank2,
    start0,
    start1,
    start2,
    padded0,
    padded1,
    padded2,
    factor0,
    factor1,
    factor2,
    dropout0,
    dropout1,
    dropout2,
    rows_b0,
    rows_b1,
    rows_b2,
    n_rows,
    n_cols,
    stride_x,
    stride_p,
    stride_w,
    row_blocks,
    copy_blocks,
    seed,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    DROPOUT: tl.constexpr,
    BESIDE: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    COPIED_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < row_blocks:
        rows = pid * ROWS + tl.arange(0, ROWS)
        x_rows = X + rows.to(tl.int64)[:, None] * stride_x
        p0 = tl.zeros((ROWS, R), dtype=tl.float32)
        p1 = tl.zeros((ROWS, R), dtype=tl.float32)
        p2 = tl.zeros((ROWS, R), dtype=tl.float32)
        for first in range(0, n_cols, COLS):
            cols = first + tl.arange(0, COLS)
            x = tl.load(x_rows + cols[None, :], mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :], other=0.0)
            x0, x1, x2 = x, x, x
            if DROPOUT:
                word0, word1, word2, _ = words(seed, rows, cols, n_cols, FIRST)
                x0 = masked(x, word0, dropout0)
                x1 = masked(x, word1, dropout1)
                x2 = masked(x, word2, dropout2)
            p0 = project_one(p0, x0, A0, rank0, cols, n_cols, R, PRECISION)
            if COUNT > 1:
                p1 = project_one(p1, x1, A1, rank1, cols, n_cols, R, PRECISION)
            if COUNT > 2:
                p2 = project_one(p2, x2, A2, rank2, cols, n_cols, R, PRECISION)
        store_one(P, p0 * factor0, rows, start0, padded0, stride_p, n_rows, R)
        if COUNT > 1:
            store_one(P, p1 * factor1, rows, start1, padded1, stride_p, n_rows, R)
        if COUNT > 2:
            store_one(P, p2 * factor2, rows, start2, padded2, stride_p, n_rows, R)
        if BESIDE:
            store_one(X, p0 * factor0, rows, n_cols + start0, padded0, stride_x, n_rows, R)
            if COUNT > 1:
                store_one(X, p1 * factor1, rows, n_cols + start1, padded1, stride_x, n_rows, R)
            if COUNT > 2:
                store_one(X, p2 * factor2, rows, n_cols + start2, padded2, stride_x, n_rows, R)
    else:
        adapter = (pid - row_blocks) // copy_blocks
        block = (pid - row_blocks) % copy_blocks
        if adapter == 0:
            copy_one(B0, W0, block, rank0, start0, rows_b0, n_cols, stride_w, R, COPIED_ROWS)
        elif adapter == 1:
            copy_one(B1, W1, block, rank1, start1, rows_b1, n_cols, stride_w, R, COPIED_ROWS)
        else:
            copy_one(B2, W2, block, rank2, start2, rows_b2, n_cols, stride_w, R, COPIED_ROWS)


@triton.jit
def grad_a_one(total, x, DP, rows, start, rank, stride, n_rows, R: tl.constexpr, PRECISION: tl.constexpr):
    r = tl.arange(0, R)
    mask = (rows < n_rows)[:, None] & (r < rank)[None, :]
    dp = tl.load(DP + rows.to(tl.int64)[:, None] * stride + (start + r)[None, :], mask=mask, other=0.0)
    return tl.dot(tl.trans(dp), x, total, input_precision=PRECISION)


@triton.jit
def store_grad_a(DA, da, rank, cols, n_cols, R: tl.constexpr):
    r = tl.arange(0, R)
    mask = (r < rank)[:, None] & (cols < n_cols)[None, :]
    tl.store(DA + r[:, None] * n_cols + cols[None, :], da.to(DA.dtype.element_ty), mask=mask)


@triton.jit
def grad_a_kernel(
    X,
    DP,
    DA0,
    DA1,
    DA2,
    rank0,
    rank1,
    rank2,
    start0,
    start1,
    start2,
    factor0,
    factor1,
    factor2,
    dropout0,
    dropout1,
    dropout2,
    n_rows,
    n_cols,
    stride_x,
    stride_dp,
    seed,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    DROPOUT: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    da0 = tl.zeros((R, COLS), dtype=tl.float32)
    da1 = tl.zeros((R, COLS), dtype=tl.float32)
    da2 = tl.zeros((R, COLS), dtype=tl.float32)
    for first in range(0, n_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        x = tl.load(X + rows.to(tl.int64)[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(
            DP.dtype.element_ty
        )
        x0, x1, x2 = x, x, x
        if DROPOUT:
            word0, word1, word2, _ = words(seed, rows, cols, n_cols, FIRST)
            x0 = masked(x, word0, dropout0)
            x1 = masked(x, word1, dropout1)
            x2 = masked(x, word2, dropout2)
        da0 = grad_a_one(da0, x0, DP, rows, start0, rank0, stride_dp, n_rows, R, PRECISION)
        if COUNT > 1:
            da1 = grad_a_one(da1, x1, DP, rows, start1, rank1, stride_dp, n_rows, R, PRECISION)
        if COUNT > 2:
            da2 = grad_a_one(da2, x2, DP, rows, start2, rank2, stride_dp, n_rows, R, PRECISION)
    store_grad_a(DA0, da0 * factor0, rank0, cols, n_cols, R)
    if COUNT > 1:
        store_grad_a(DA1, da1 * factor1, rank1, cols, n_cols, R)
    if COUNT > 2:
        store_grad_a(DA2, da2 * factor2, rank2, cols, n_cols, R)


@triton.jit
def grad_input_one(DP, A, rows, cols, start, rank, stride, n_rows, n_cols, R: tl.constexpr, PRECISION: tl.constexpr):
    r = tl.arange(0, R)
    mask = (rows < n_rows)[:, None] & (r < rank)[None, :]
    dp = tl.load(DP + rows.to(tl.int64)[:, None] * stride + (start + r)[None, :], mask=mask, other=0.0)
    a = tl.load(A + r[:, None] * n_cols + cols[None, :], mask=(r < rank)[:, None] & (cols < n_cols)[None, :], other=0.0)
    return tl.dot(dp, a.to(dp.dtype), input_precision=PRECISION)


@triton.jit
def add_grad_input_kernel(
    DX,
    DP,
    A0,
    A1,
    A2,
    rank0,
    rank1,
    rank2,
    start0,
    start1,
    start2,
    factor0,
    factor1,
    factor2,
    dropout0,
    dropout1,
    dropout2,
    n_rows,
    n_cols,
    stride_dx,
    stride_dp,
    seed,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    DROPOUT: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    part0 = grad_input_one(DP, A0, rows, cols, start0, rank0, stride_dp, n_rows, n_cols, R, PRECISION) * factor0
    if COUNT > 1:
        part1 = grad_input_one(DP, A1, rows, cols, start1, rank1, stride_dp, n_rows, n_cols, R, PRECISION) * factor1
    if COUNT > 2:
        part2 = grad_input_one(DP, A2, rows, cols, start2, rank2, stride_dp, n_rows, n_cols, R, PRECISION) * factor2
    if DROPOUT:
        word0, word1, word2, _ = words(seed, rows, cols, n_cols, FIRST)
        part0 = masked(part0, word0, dropout0)
        if COUNT > 1:
            part1 = masked(part1, word1, dropout1)
        if COUNT > 2:
            part2 = masked(part2, word2, dropout2)
    if COUNT > 1:
        part0 += part1
    if COUNT > 2:
        part0 += part2
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    dx = DX + rows.to(tl.int64)[:, None] * stride_dx + cols[None, :]
    tl.store(dx, (tl.load(dx, mask=mask, other=0.0).to(tl.float32) + part0).to(DX.dtype.element_ty), mask=mask)


@triton.jit
def mask_kernel(
    M, n_rows, n_cols, dropout, seed, WORD: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    word0, word1, word2, _ = words(seed, rows, cols, n_cols, FIRST)
    word = word0
    if WORD == 1:
        word = word1
    if WORD == 2:
        word = word2
    kept = masked(tl.full((ROWS, COLS), 1.0, tl.float32), word, dropout)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    tl.store(M + rows.to(tl.int64)[:, None] * n_cols + cols[None, :], kept.to(M.dtype.element_ty), mask=mask)
