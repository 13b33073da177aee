"""What `qk_norm_rope` does with the heads of one side, q or k, in Triton; the launches are in fused.py."""

import triton
import triton.language as tl

from automodel_accel.kernels.rope.fused import load_pairs, load_table, store_pairs


@triton.jit
def forward_heads(
    X,
    Y,
    W,
    RSTD,
    first_head,
    n_heads,
    stride_xh,
    stride_yh,
    cos_1,
    cos_2,
    sin_1,
    sin_2,
    eps,
    offset,
    IN_INTERLEAVED: tl.constexpr,
    OUT_INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Heads `first_head`... of the token at X, to the token at Y."""
    head = (first_head + tl.arange(0, HEADS)).to(tl.int64)  # offsets pass 2^31 elements
    mask = head < n_heads
    a, b = load_pairs(X, head * stride_xh, mask, IN_INTERLEAVED, HALF, BLOCK, HEADS)
    squares = tl.sum(a * a + b * b, 1)
    if REST:
        rest = tl.arange(0, BLOCK_REST)
        in_rest = mask[:, None] & (rest < REST)[None, :]
        at_x = X + 2 * HALF + (head * stride_xh)[:, None] + rest[None, :]
        x_rest = tl.load(at_x, mask=in_rest, other=0.0).to(tl.float32)
        squares += tl.sum(x_rest * x_rest, 1)
    rstd = tl.rsqrt(squares / (2 * HALF + REST) + eps)
    tl.store(RSTD + head, rstd, mask=mask)
    w_1, w_2 = load_table(W, 1, False, IN_INTERLEAVED, HALF, BLOCK)
    a = a * rstd[:, None] * (w_1 + offset)[None, :]
    b = b * rstd[:, None] * (w_2 + offset)[None, :]
    y_1 = a * cos_1[None, :] - b * sin_1[None, :]
    y_2 = b * cos_2[None, :] + a * sin_2[None, :]
    store_pairs(Y, head * stride_yh, mask, y_1, y_2, OUT_INTERLEAVED, HALF, BLOCK, HEADS)
    if REST:
        w_rest = tl.load(W + 2 * HALF + rest, mask=rest < REST, other=0.0).to(tl.float32) + offset
        at_y = Y + 2 * HALF + (head * stride_yh)[:, None] + rest[None, :]
        tl.store(at_y, (x_rest * rstd[:, None] * w_rest[None, :]).to(Y.dtype.element_ty), mask=in_rest)


@triton.jit
def backward_heads(
    DY,
    X,
    W,
    RSTD,
    DX,
    DW_PARTIAL,
    COS,
    SIN,
    first,
    n_all_tokens,
    n_tokens,
    n_heads,
    stride_dyb,
    stride_dys,
    stride_dyh,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_cos_b,
    stride_cos_s,
    stride_cos_r,
    stride_sin_b,
    stride_sin_s,
    stride_sin_r,
    offset,
    PROGRAMS: tl.constexpr,
    GROUPS: tl.constexpr,
    INVERSE: tl.constexpr,
    PER_PAIR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IN_INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Tiles `first`, `first` + PROGRAMS, ... of one side: a tile is up to HEADS heads of one token, GROUPS tiles a token."""
    zero = tl.full((), 0, tl.int64)  # offsets pass 2^31 elements
    size: tl.constexpr = 2 * HALF + REST
    pair = tl.arange(0, BLOCK)
    rest = tl.arange(0, BLOCK_REST)
    w_1, w_2 = load_table(W, 1, False, IN_INTERLEAVED, HALF, BLOCK)
    dw_1 = tl.zeros((BLOCK,), tl.float32)
    dw_2 = tl.zeros((BLOCK,), tl.float32)
    if REST:
        w_rest = tl.load(W + 2 * HALF + rest, mask=rest < REST, other=0.0).to(tl.float32) + offset
        dw_rest = tl.zeros((BLOCK_REST,), tl.float32)
    for tile in tl.range(first, n_all_tokens * GROUPS, PROGRAMS):
        token = zero + tile // GROUPS
        b = token // n_tokens
        s = token % n_tokens
        head = zero + (tile % GROUPS) * HEADS + tl.arange(0, HEADS)
        mask = head < n_heads
        cos_1, cos_2 = load_table(
            COS + b * stride_cos_b + s * stride_cos_s, stride_cos_r, PER_PAIR, INTERLEAVED, HALF, BLOCK
        )
        sin_1, sin_2 = load_table(
            SIN + b * stride_sin_b + s * stride_sin_s, stride_sin_r, PER_PAIR, INTERLEAVED, HALF, BLOCK
        )
        if INVERSE:
            sin_1 = -sin_1
            sin_2 = -sin_2
        in_dy = b * stride_dyb + s * stride_dys + head * stride_dyh
        in_x = b * stride_xb + s * stride_xs + head * stride_xh
        in_dx = (token * n_heads + head) * size
        dy_1, dy_2 = load_pairs(DY, in_dy, mask, INTERLEAVED, HALF, BLOCK, HEADS)
        x_1, x_2 = load_pairs(X, in_x, mask, IN_INTERLEAVED, HALF, BLOCK, HEADS)
        rstd = tl.load(RSTD + token * n_heads + head, mask=mask, other=0.0)[:, None]
        x_1 *= rstd
        x_2 *= rstd
        g_1 = cos_1[None, :] * dy_1 + sin_2[None, :] * dy_2
        g_2 = cos_2[None, :] * dy_2 - sin_1[None, :] * dy_1
        dw_1 += tl.sum(g_1 * x_1, 0)
        dw_2 += tl.sum(g_2 * x_2, 0)
        g_1 *= (w_1 + offset)[None, :]
        g_2 *= (w_2 + offset)[None, :]
        along_x = tl.sum(g_1 * x_1 + g_2 * x_2, 1)
        if REST:
            in_rest = mask[:, None] & (rest < REST)[None, :]
            beside = 2 * HALF + rest[None, :]
            x_rest = tl.load(X + in_x[:, None] + beside, mask=in_rest, other=0.0).to(tl.float32) * rstd
            g_rest = tl.load(DY + in_dy[:, None] + beside, mask=in_rest, other=0.0).to(tl.float32)
            dw_rest += tl.sum(g_rest * x_rest, 0)
            g_rest *= w_rest[None, :]
            along_x += tl.sum(g_rest * x_rest, 1)
        along_x = (along_x / size)[:, None]
        dx_1 = (g_1 - x_1 * along_x) * rstd
        dx_2 = (g_2 - x_2 * along_x) * rstd
        store_pairs(DX, in_dx, mask, dx_1, dx_2, IN_INTERLEAVED, HALF, BLOCK, HEADS)
        if REST:
            dx_rest = (g_rest - x_rest * along_x) * rstd
            tl.store(DX + in_dx[:, None] + beside, dx_rest.to(DX.dtype.element_ty), mask=in_rest)
    if IN_INTERLEAVED:
        tl.store(DW_PARTIAL + 2 * pair, dw_1, mask=pair < HALF)
        tl.store(DW_PARTIAL + 2 * pair + 1, dw_2, mask=pair < HALF)
    else:
        tl.store(DW_PARTIAL + pair, dw_1, mask=pair < HALF)
        tl.store(DW_PARTIAL + HALF + pair, dw_2, mask=pair < HALF)
    if REST:
        tl.store(DW_PARTIAL + 2 * HALF + rest, dw_rest, mask=rest < REST)
