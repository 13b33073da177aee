"""`rope` in Triton: one launch for q and k, forward and backward by the same kernel.

Bytes per call are the floor: q and k are read and written once, in the strides they have; cos and sin once a program. A program
serves one token and up to `PROGRAM_ELEMENTS` elements of its heads: the heads of one token lie side by side in the output
of a projection, and all of them need the same row of cos and sin. The first programs of a token serve q, the others k.
Shapes and letters as in eager.py.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from automodel_accel.kernels.launch import cdiv, next_power_of_2

PROGRAM_ELEMENTS = 4096
WARPS = 4


@triton.jit
def load_pairs(
    X, offsets, mask, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr
):
    """The first and the second of the pairs of each head, [HEADS, BLOCK] in float32."""
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK)
        in_both = mask[:, None] & (both < 2 * HALF)[None, :]
        x = tl.load(X + offsets[:, None] + both[None, :], mask=in_both, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (HEADS, BLOCK, 2)))
    else:
        pair = tl.arange(0, BLOCK)
        in_half = mask[:, None] & (pair < HALF)[None, :]
        at = X + offsets[:, None] + pair[None, :]
        first = tl.load(at, mask=in_half, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=in_half, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(
    Y,
    offsets,
    mask,
    first,
    second,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The reverse of `load_pairs`, rounded to the dtype of Y."""
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK)
        in_both = mask[:, None] & (both < 2 * HALF)[None, :]
        y = tl.reshape(tl.join(first, second), (HEADS, 2 * BLOCK))
        tl.store(Y + offsets[:, None] + both[None, :], y.to(Y.dtype.element_ty), mask=in_both)
    else:
        pair = tl.arange(0, BLOCK)
        in_half = mask[:, None] & (pair < HALF)[None, :]
        at = Y + offsets[:, None] + pair[None, :]
        tl.store(at, first.to(Y.dtype.element_ty), mask=in_half)
        tl.store(at + HALF, second.to(Y.dtype.element_ty), mask=in_half)


@triton.jit
def rotate_heads(
    X,
    Y,
    first_head,
    n_heads,
    stride_xh,
    stride_yh,
    cos_1,
    cos_2,
    cross_1,
    cross_2,
    IN_INTERLEAVED: tl.constexpr,
    OUT_INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Heads `first_head`... of the token at X, to the token at Y; what is not rotated is copied."""
    head = (first_head + tl.arange(0, HEADS)).to(tl.int64)  # offsets pass 2^31 elements
    mask = head < n_heads
    a, b = load_pairs(X, head * stride_xh, mask, IN_INTERLEAVED, HALF, BLOCK, HEADS)
    y_1 = a * cos_1[None, :] + b * cross_1[None, :]
    y_2 = b * cos_2[None, :] + a * cross_2[None, :]
    store_pairs(Y, head * stride_yh, mask, y_1, y_2, OUT_INTERLEAVED, HALF, BLOCK, HEADS)
    if REST:
        rest = tl.arange(0, BLOCK_REST)
        in_rest = mask[:, None] & (rest < REST)[None, :]
        at_x = X + 2 * HALF + (head * stride_xh)[:, None] + rest[None, :]
        at_y = Y + 2 * HALF + (head * stride_yh)[:, None] + rest[None, :]
        tl.store(at_y, tl.load(at_x, mask=in_rest, other=0.0).to(Y.dtype.element_ty), mask=in_rest)


@triton.jit
def load_table(T, stride, PER_PAIR: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """cos or sin of one token for the first and for the second of the pairs, [BLOCK] in float32."""
    pair = tl.arange(0, BLOCK)
    if PER_PAIR:
        first = tl.load(T + pair * stride, mask=pair < HALF, other=0.0).to(tl.float32)
        second = first
    elif INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK)
        table = tl.load(T + both * stride, mask=both < 2 * HALF, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(table, (BLOCK, 2)))
    else:
        first = tl.load(T + pair * stride, mask=pair < HALF, other=0.0).to(tl.float32)
        second = tl.load(T + (pair + HALF) * stride, mask=pair < HALF, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def rope_kernel(
    Q,
    K,
    Q_OUT,
    K_OUT,
    COS,
    SIN,
    n_tokens,
    n_q_heads,
    n_k_heads,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_q_out_b,
    stride_q_out_s,
    stride_q_out_h,
    stride_k_out_b,
    stride_k_out_s,
    stride_k_out_h,
    stride_cos_b,
    stride_cos_s,
    stride_cos_r,
    stride_sin_b,
    stride_sin_s,
    stride_sin_r,
    Q_PROGRAMS: tl.constexpr,
    HAS_K: tl.constexpr,
    BACKWARD: tl.constexpr,
    INVERSE: tl.constexpr,
    PER_PAIR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IN_INTERLEAVED: tl.constexpr,
    OUT_INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
):
    zero = tl.full((), 0, tl.int64)  # offsets pass 2^31 elements
    b = zero + tl.program_id(0) // n_tokens
    s = zero + tl.program_id(0) % n_tokens
    part = tl.program_id(1)
    cos_1, cos_2 = load_table(
        COS + b * stride_cos_b + s * stride_cos_s, stride_cos_r, PER_PAIR, INTERLEAVED, HALF, BLOCK
    )
    sin_1, sin_2 = load_table(
        SIN + b * stride_sin_b + s * stride_sin_s, stride_sin_r, PER_PAIR, INTERLEAVED, HALF, BLOCK
    )
    if INVERSE:
        sin_1 = -sin_1
        sin_2 = -sin_2
    # y_1 = cos_1 a - sin_1 b, y_2 = cos_2 b + sin_2 a; backward is the transpose
    if BACKWARD:
        cross_1 = sin_2
        cross_2 = -sin_1
    else:
        cross_1 = -sin_1
        cross_2 = sin_2
    if part < Q_PROGRAMS:
        rotate_heads(
            Q + b * stride_qb + s * stride_qs,
            Q_OUT + b * stride_q_out_b + s * stride_q_out_s,
            part * Q_HEADS,
            n_q_heads,
            stride_qh,
            stride_q_out_h,
            cos_1,
            cos_2,
            cross_1,
            cross_2,
            IN_INTERLEAVED,
            OUT_INTERLEAVED,
            HALF,
            REST,
            BLOCK,
            BLOCK_REST,
            Q_HEADS,
        )
    elif HAS_K:
        rotate_heads(
            K + b * stride_kb + s * stride_ks,
            K_OUT + b * stride_k_out_b + s * stride_k_out_s,
            (part - Q_PROGRAMS) * K_HEADS,
            n_k_heads,
            stride_kh,
            stride_k_out_h,
            cos_1,
            cos_2,
            cross_1,
            cross_2,
            IN_INTERLEAVED,
            OUT_INTERLEAVED,
            HALF,
            REST,
            BLOCK,
            BLOCK_REST,
            K_HEADS,
        )


def forward(
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    cos_BSR: torch.Tensor,
    sin_BSR: torch.Tensor,
    layout: str,
    per_pair: bool,
    inverse: bool,
) -> None:
    """Write each rotated input into its output."""
    _launch(inputs, outputs, cos_BSR, sin_BSR, layout, per_pair, inverse, backward=False)


def backward(
    grad_outputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    cos_BSR: torch.Tensor,
    sin_BSR: torch.Tensor,
    layout: str,
    per_pair: bool,
    inverse: bool,
) -> None:
    """Write the gradient of each input into `grads`."""
    _launch(grad_outputs, grads, cos_BSR, sin_BSR, layout, per_pair, inverse, backward=True)


def _launch(
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    cos_BSR: torch.Tensor,
    sin_BSR: torch.Tensor,
    layout: str,
    per_pair: bool,
    inverse: bool,
    backward: bool,
) -> None:
    q, k = (*map(unit_stride, inputs), None)[:2]
    q_out, k_out = (*outputs, None)[:2]
    assert q is not None
    assert q_out is not None
    batch, n_tokens, n_q_heads, head_dim = q.shape
    n_k_heads = 0 if k is None else k.shape[2]
    half = cos_BSR.shape[-1] // (1 if per_pair else 2)
    block, rest = next_power_of_2(half), head_dim - 2 * half
    q_heads, k_heads = (heads_of_a_program(n_heads, block) for n_heads in (n_q_heads, n_k_heads))
    q_programs = cdiv(n_q_heads, q_heads)
    grid = (batch * n_tokens, q_programs + cdiv(n_k_heads, k_heads))
    if grid[0] * grid[1] == 0:
        return
    sides = (layout != "half", layout == "interleaved")
    rope_kernel[grid](
        q,
        k,
        q_out,
        k_out,
        cos_BSR,
        sin_BSR,
        n_tokens,
        n_q_heads,
        n_k_heads,
        *q.stride()[:3],
        *((0, 0, 0) if k is None else k.stride()[:3]),
        *q_out.stride()[:3],
        *((0, 0, 0) if k_out is None else k_out.stride()[:3]),
        *table_strides(cos_BSR),
        *table_strides(sin_BSR),
        Q_PROGRAMS=q_programs,
        HAS_K=k is not None,
        BACKWARD=backward,
        INVERSE=inverse,
        PER_PAIR=per_pair,
        INTERLEAVED=layout == "interleaved",
        IN_INTERLEAVED=sides[backward],
        OUT_INTERLEAVED=sides[not backward],
        HALF=half,
        REST=rest,
        BLOCK=block,
        BLOCK_REST=next_power_of_2(max(rest, 1)),
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x with the elements of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def table_strides(table_BSR: torch.Tensor) -> tuple[int, int, int]:
    """Strides of cos or sin, of which one row may serve the whole batch."""
    batch, tokens, row = table_BSR.stride()
    return (0 if table_BSR.shape[0] == 1 else batch, tokens, row)


@functools.cache
def heads_of_a_program(n_heads: int, block: int, elements: int = PROGRAM_ELEMENTS) -> int:
    """A power of 2: all heads of a token, or as many as `elements` hold."""
    fit: int = min(next_power_of_2(max(n_heads, 1)), max(elements // (2 * block), 1))
    return fit
