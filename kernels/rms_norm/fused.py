"""`rms_norm` in Triton: one pass forward, one pass backward.

Bytes per call, of the floor: forward 2 passes over [N, H] (read x, write y) plus 4 N for rstd; backward 3 passes (read x and
grad_output, write grad_x) plus 4 P H written and read once for the partial weight gradients of P programs.
A persistent grid of two programs per multiprocessor walks the rows; `num_stages` prefetches the next rows while one is
computed, which is what keeps enough bytes in flight. No atomics: a second kernel adds the partial sums in a fixed order, and
writes the gradient in the weight's dtype. Other norms share that kernel.
Where asked for, forward also writes the largest value of each row of y, or a cast of it: fp8_linear/noted.py.
Shapes and letters as in eager.py.
"""

import torch
import triton
import triton.language as tl

from automodel_accel.kernels.fp8_linear import noted
from automodel_accel.kernels.fp8_linear.noted_fused import note_row
from automodel_accel.kernels.launch import cdiv, next_power_of_2, persistent_programs, prefetch_stages, row_warps
from automodel_accel.kernels.room import empty_rows

PROGRAMS_PER_PROCESSOR = 2
PARTIALS, PARTIAL_COLS = 64, 32  # tile of partial sums: four words of 16 bytes a thread


@triton.jit
def rms_norm_fwd_kernel(
    X,
    W,
    Y,
    RSTD,
    AMAX,
    Q,
    SCALE,
    n_rows,
    n_cols,
    stride_x,
    stride_y,
    eps,
    offset,
    HAS_WEIGHT: tl.constexpr,
    CAST_THEN_MUL: tl.constexpr,
    HAS_AMAX: tl.constexpr,
    HAS_Q: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    in_row = cols < n_cols
    zero = tl.full((), 0, tl.int64)  # row offsets pass 2^31 elements
    if HAS_WEIGHT:
        w = tl.load(W + cols, mask=in_row, other=0.0)
        if CAST_THEN_MUL:
            w = (w.to(tl.float32) + offset).to(W.dtype.element_ty).to(tl.float32)
        else:
            w = w.to(tl.float32) + offset
    for row in tl.range(tl.program_id(0), n_rows, PROGRAMS, num_stages=STAGES):
        start = zero + row
        x = tl.load(X + start * stride_x + cols, mask=in_row, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 0) / n_cols + eps)
        y = x * rstd
        if HAS_WEIGHT:
            if CAST_THEN_MUL:
                y = y.to(X.dtype.element_ty).to(tl.float32)
            y = y * w
        tl.store(Y + start * stride_y + cols, y.to(Y.dtype.element_ty), mask=in_row)
        tl.store(RSTD + row, rstd)
        if HAS_AMAX:
            note_row(y, Y, in_row, cols, start, n_cols, AMAX, Q, SCALE, HAS_Q, EXPONENT, MANTISSA)


@triton.jit
def rms_norm_bwd_kernel(
    DY,
    X,
    W,
    RSTD,
    DX,
    DW_PARTIAL,
    n_rows,
    n_cols,
    stride_dy,
    stride_x,
    offset,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    CAST_THEN_MUL: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    in_row = cols < n_cols
    zero = tl.full((), 0, tl.int64)  # row offsets pass 2^31 elements
    if HAS_WEIGHT:
        w = tl.load(W + cols, mask=in_row, other=0.0).to(tl.float32) + offset
    if NEEDS_DW:
        dw = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in tl.range(tl.program_id(0), n_rows, PROGRAMS, num_stages=STAGES):
        start = zero + row
        x = tl.load(X + start * stride_x + cols, mask=in_row, other=0.0).to(tl.float32)
        dy = tl.load(DY + start * stride_dy + cols, mask=in_row, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row)
        normed = x * rstd
        if NEEDS_DW:
            if CAST_THEN_MUL:
                dw += dy * normed.to(X.dtype.element_ty).to(tl.float32)
            else:
                dw += dy * normed
        if HAS_WEIGHT:
            dy = dy * w
        along_normed = tl.sum(dy * normed, 0) / n_cols
        dx = (dy - normed * along_normed) * rstd
        tl.store(DX + start * n_cols + cols, dx.to(DX.dtype.element_ty), mask=in_row)
    if NEEDS_DW:
        tl.store(DW_PARTIAL + tl.program_id(0) * n_cols + cols, dw, mask=in_row)


@triton.jit
def sum_partials_kernel(PARTIAL, SUM, n_partials, n_cols, PARTIALS: tl.constexpr, COLS: tl.constexpr):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_row = cols < n_cols
    total = tl.zeros((PARTIALS, COLS), dtype=tl.float32)
    for first in range(0, n_partials, PARTIALS):
        partial = first + tl.arange(0, PARTIALS)
        mask = (partial < n_partials)[:, None] & in_row[None, :]
        total += tl.load(PARTIAL + partial[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
    tl.store(SUM + cols, tl.sum(total, 0).to(SUM.dtype.element_ty), mask=in_row)


def forward(
    x_NH: torch.Tensor, weight_H: torch.Tensor | None, eps: float, offset: float, order: str, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [N, H] in `out_dtype`, and rstd [N] in float32."""
    n_rows, n_cols = x_NH.shape
    y_NH = empty_rows(n_rows, n_cols, out_dtype, x_NH.device)
    rstd_N = torch.empty(n_rows, dtype=torch.float32, device=x_NH.device)
    if n_rows == 0:
        return y_NH, rstd_N
    notes = noted.slots(y_NH, noted.wanted(y_NH.device.type))
    block = next_power_of_2(n_cols)
    programs = min(n_rows, persistent_programs(x_NH.device, PROGRAMS_PER_PROCESSOR))
    rms_norm_fwd_kernel[(programs,)](
        x_NH,
        None if weight_H is None else weight_H.contiguous(),
        y_NH,
        rstd_N,
        *notes.pointers(),
        n_rows,
        n_cols,
        x_NH.stride(0),
        y_NH.stride(0),
        eps,
        offset,
        HAS_WEIGHT=weight_H is not None,
        CAST_THEN_MUL=order == "cast_then_mul",
        **notes.constants(),
        BLOCK=block,
        PROGRAMS=programs,
        STAGES=prefetch_stages(block * x_NH.element_size()),
        num_warps=row_warps(block),
        enable_fp_fusion=True,
    )
    noted.leave(y_NH, notes)
    return y_NH, rstd_N


def backward(
    grad_output_NH: torch.Tensor,
    x_NH: torch.Tensor,
    weight_H: torch.Tensor | None,
    rstd_N: torch.Tensor,
    offset: float,
    order: str,
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return grad_x [N, H] in x's dtype, and grad_weight [H] in the weight's dtype (None where not needed)."""
    n_rows, n_cols = x_NH.shape
    grad_x_NH = torch.empty(n_rows, n_cols, dtype=x_NH.dtype, device=x_NH.device)
    if n_rows == 0:
        return grad_x_NH, torch.zeros_like(weight_H) if needs_grad_weight and weight_H is not None else None
    block = next_power_of_2(n_cols)
    programs = min(n_rows, persistent_programs(x_NH.device, PROGRAMS_PER_PROCESSOR))
    partial_PH = (
        x_NH.new_empty(programs, n_cols, dtype=torch.float32) if needs_grad_weight and weight_H is not None else None
    )
    rms_norm_bwd_kernel[(programs,)](
        grad_output_NH,
        x_NH,
        None if weight_H is None else weight_H.contiguous(),
        rstd_N,
        grad_x_NH,
        partial_PH,
        n_rows,
        n_cols,
        grad_output_NH.stride(0),
        x_NH.stride(0),
        offset,
        HAS_WEIGHT=weight_H is not None,
        NEEDS_DW=partial_PH is not None,
        CAST_THEN_MUL=order == "cast_then_mul",
        BLOCK=block,
        PROGRAMS=programs,
        STAGES=prefetch_stages(block * (x_NH.element_size() + grad_output_NH.element_size())),
        num_warps=row_warps(block),
        enable_fp_fusion=True,
    )
    if partial_PH is None or weight_H is None:
        return grad_x_NH, None
    return grad_x_NH, sum_partials(partial_PH, weight_H.dtype)


def sum_partials(partial_PH: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of contiguous float32 [P, H] over P in `dtype`, in one launch: torch's sum and cast are two."""
    sum_H = torch.empty(partial_PH.shape[1], dtype=dtype, device=partial_PH.device)
    sum_partials_kernel[(cdiv(partial_PH.shape[1], PARTIAL_COLS),)](
        partial_PH,
        sum_H,
        *partial_PH.shape,
        PARTIALS=PARTIALS,
        COLS=PARTIAL_COLS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return sum_H
