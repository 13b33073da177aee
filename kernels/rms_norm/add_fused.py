"""`add_rms_norm` in Triton: one launch forward, one backward.

Bytes per call, of the floor: forward 4 passes over [N, H] (read x and residual, write h and y) plus 4 N for rstd; backward 4
passes (read h, grad_y and grad_h, write one gradient that x and the residual share), 5 where x was scaled or has a dtype of its
own, plus 4 P H written and read once for the partial weight gradients of P programs. Apart, the sum and the norm take 5 and 6.
Grid, prefetching, partial sums and notes as in fused.py. Shapes and letters as in add_eager.py.
"""

import torch
import triton
import triton.language as tl

from automodel_accel.kernels.fp8_linear import noted
from automodel_accel.kernels.fp8_linear.noted_fused import note_row
from automodel_accel.kernels.launch import next_power_of_2, persistent_programs, prefetch_stages, row_warps
from automodel_accel.kernels.rms_norm.fused import sum_partials
from automodel_accel.kernels.room import empty_rows

PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def add_rms_norm_fwd_kernel(
    X,
    RESIDUAL,
    W,
    Y,
    H,
    RSTD,
    AMAX,
    Q,
    SCALE,
    n_rows,
    n_cols,
    stride_x,
    stride_residual,
    stride_y,
    eps,
    offset,
    scale,
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
        residual = tl.load(RESIDUAL + start * stride_residual + cols, mask=in_row, other=0.0).to(tl.float32)
        scaled = (x * scale).to(X.dtype.element_ty).to(tl.float32)
        h = (residual + scaled).to(H.dtype.element_ty)
        tl.store(H + start * n_cols + cols, h, mask=in_row)
        h_wide = h.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(h_wide * h_wide, 0) / n_cols + eps)
        y = h_wide * rstd
        if HAS_WEIGHT:
            if CAST_THEN_MUL:
                y = y.to(H.dtype.element_ty).to(tl.float32)
            y = y * w
        tl.store(Y + start * stride_y + cols, y.to(Y.dtype.element_ty), mask=in_row)
        tl.store(RSTD + row, rstd)
        if HAS_AMAX:
            note_row(y, Y, in_row, cols, start, n_cols, AMAX, Q, SCALE, HAS_Q, EXPONENT, MANTISSA)


@triton.jit
def add_rms_norm_bwd_kernel(
    DY,
    DH,
    H,
    W,
    RSTD,
    DRESIDUAL,
    DX,
    DW_PARTIAL,
    n_rows,
    n_cols,
    stride_dy,
    stride_dh,
    offset,
    scale,
    HAS_DH: tl.constexpr,
    HAS_DX: tl.constexpr,
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
        h = tl.load(H + start * n_cols + cols, mask=in_row, other=0.0).to(tl.float32)
        dy = tl.load(DY + start * stride_dy + cols, mask=in_row, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row)
        normed = h * rstd
        if NEEDS_DW:
            if CAST_THEN_MUL:
                dw += dy * normed.to(H.dtype.element_ty).to(tl.float32)
            else:
                dw += dy * normed
        if HAS_WEIGHT:
            dy = dy * w
        along_normed = tl.sum(dy * normed, 0) / n_cols
        grad = (dy - normed * along_normed) * rstd
        if HAS_DH:
            grad += tl.load(DH + start * stride_dh + cols, mask=in_row, other=0.0).to(tl.float32)
        tl.store(DRESIDUAL + start * n_cols + cols, grad.to(DRESIDUAL.dtype.element_ty), mask=in_row)
        if HAS_DX:
            tl.store(DX + start * n_cols + cols, (grad * scale).to(DX.dtype.element_ty), mask=in_row)
    if NEEDS_DW:
        tl.store(DW_PARTIAL + tl.program_id(0) * n_cols + cols, dw, mask=in_row)


def forward(
    x_NH: torch.Tensor,
    residual_NH: torch.Tensor,
    weight_H: torch.Tensor | None,
    eps: float,
    offset: float,
    order: str,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y [N, H] in `out_dtype`, h [N, H] in the dtype of the sum, and rstd [N] in float32."""
    n_rows, n_cols = x_NH.shape
    h_dtype = torch.promote_types(x_NH.dtype, residual_NH.dtype)
    h_NH = torch.empty(n_rows, n_cols, dtype=h_dtype, device=x_NH.device)
    y_NH = empty_rows(n_rows, n_cols, out_dtype, x_NH.device)
    rstd_N = torch.empty(n_rows, dtype=torch.float32, device=x_NH.device)
    if n_rows == 0:
        return y_NH, h_NH, rstd_N
    notes = noted.slots(y_NH, noted.wanted(y_NH.device.type))
    block = next_power_of_2(n_cols)
    programs = min(n_rows, persistent_programs(x_NH.device, PROGRAMS_PER_PROCESSOR))
    add_rms_norm_fwd_kernel[(programs,)](
        x_NH,
        residual_NH,
        None if weight_H is None else weight_H.contiguous(),
        y_NH,
        h_NH,
        rstd_N,
        *notes.pointers(),
        n_rows,
        n_cols,
        x_NH.stride(0),
        residual_NH.stride(0),
        y_NH.stride(0),
        eps,
        offset,
        scale,
        HAS_WEIGHT=weight_H is not None,
        CAST_THEN_MUL=order == "cast_then_mul",
        **notes.constants(),
        BLOCK=block,
        PROGRAMS=programs,
        STAGES=prefetch_stages(block * (x_NH.element_size() + residual_NH.element_size())),
        num_warps=row_warps(block),
        enable_fp_fusion=False,  # residual + scale * x rounds twice in the model, so it must here
    )
    noted.leave(y_NH, notes)
    return y_NH, h_NH, rstd_N


def backward(
    grad_y_NH: torch.Tensor,
    grad_h_NH: torch.Tensor | None,
    h_NH: torch.Tensor,
    weight_H: torch.Tensor | None,
    rstd_N: torch.Tensor,
    offset: float,
    order: str,
    scale: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return grad_residual [N, H], grad_x [N, H] (None where it is the same), grad_weight [H] (None where not needed).

    `dtypes` are those of x and of the residual.
    """
    n_rows, n_cols = h_NH.shape
    x_dtype, residual_dtype = dtypes
    grad_residual_NH = torch.empty(n_rows, n_cols, dtype=residual_dtype, device=h_NH.device)
    apart = scale != 1.0 or x_dtype != residual_dtype
    grad_x_NH = torch.empty(n_rows, n_cols, dtype=x_dtype, device=h_NH.device) if apart else None
    with_weight = needs_grad_weight and weight_H is not None
    if n_rows == 0:
        return grad_residual_NH, grad_x_NH, torch.zeros_like(weight_H) if with_weight else None  # type: ignore[arg-type]
    block = next_power_of_2(n_cols)
    programs = min(n_rows, persistent_programs(h_NH.device, PROGRAMS_PER_PROCESSOR))
    partial_PH = h_NH.new_empty(programs, n_cols, dtype=torch.float32) if with_weight else None
    read = [tensor for tensor in (h_NH, grad_y_NH, grad_h_NH) if tensor is not None]
    add_rms_norm_bwd_kernel[(programs,)](
        grad_y_NH,
        grad_h_NH,
        h_NH.contiguous(),
        None if weight_H is None else weight_H.contiguous(),
        rstd_N,
        grad_residual_NH,
        grad_x_NH,
        partial_PH,
        n_rows,
        n_cols,
        grad_y_NH.stride(0),
        0 if grad_h_NH is None else grad_h_NH.stride(0),
        offset,
        scale,
        HAS_DH=grad_h_NH is not None,
        HAS_DX=apart,
        HAS_WEIGHT=weight_H is not None,
        NEEDS_DW=with_weight,
        CAST_THEN_MUL=order == "cast_then_mul",
        BLOCK=block,
        PROGRAMS=programs,
        STAGES=prefetch_stages(block * sum(tensor.element_size() for tensor in read)),
        num_warps=row_warps(block),
        enable_fp_fusion=True,
    )
    if partial_PH is None or weight_H is None:
        return grad_residual_NH, grad_x_NH, None
    return grad_residual_NH, grad_x_NH, sum_partials(partial_PH, weight_H.dtype)
