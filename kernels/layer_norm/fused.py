"""`layer_norm` in Triton: one pass forward, one pass backward, with the residual or without.

Bytes per call, of the floor: forward 2 passes over [N, H] (read x, write y), with the residual 4 (read both, write y and h);
backward 3 (read h and grad_y, write the gradient), 4 where h has a gradient of its own; 8 N for mean and rstd; 8 P H written and
read once for the partial gradients of weight and bias of P programs. Grid, prefetch and sums as in rms_norm: persistent, two
programs a multiprocessor, no atomics. The variance is summed over x - mean, in registers: no cancellation.
Shapes and letters as in eager.py.
"""

import torch
import triton
import triton.language as tl

from automodel_accel.kernels.launch import next_power_of_2, persistent_programs, prefetch_stages, row_warps
from automodel_accel.kernels.rms_norm.fused import sum_partials

PROGRAMS_PER_PROCESSOR = 2
# in backward, a thread has 128 registers, of 64 a row of 8192 would spill; and of a row longer than WIDE a multiprocessor holds
# one program, whose prefetch is deep enough
BACKWARD_WARPS = 16
WIDE = 2048


@triton.jit
def layer_norm_fwd_kernel(
    X,
    RESIDUAL,
    W,
    B,
    Y,
    H,
    MEAN,
    RSTD,
    n_rows,
    n_cols,
    stride_x,
    stride_residual,
    eps,
    scale,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    in_row = cols < n_cols
    zero = tl.full((), 0, tl.int64)  # row offsets pass 2^31 elements
    if HAS_WEIGHT:
        w = tl.load(W + cols, mask=in_row, other=0.0).to(tl.float32) + offset
        w = w.to(W.dtype.element_ty).to(tl.float32)
    if HAS_BIAS:
        b = tl.load(B + cols, mask=in_row, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0), n_rows, PROGRAMS, num_stages=STAGES):
        start = zero + row
        h = tl.load(X + start * stride_x + cols, mask=in_row, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            if HAS_SCALE:
                h = (h * scale).to(X.dtype.element_ty).to(tl.float32)
            h += tl.load(RESIDUAL + start * stride_residual + cols, mask=in_row, other=0.0).to(tl.float32)
            rounded = h.to(H.dtype.element_ty)
            tl.store(H + start * n_cols + cols, rounded, mask=in_row)
            h = rounded.to(tl.float32)
        mean = tl.sum(h, 0) / n_cols
        mean += tl.sum(tl.where(in_row, h - mean, 0.0), 0) / n_cols  # to the last bit: equal elements have no variance
        centred = tl.where(in_row, h - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / n_cols + eps)
        y = centred * rstd
        if HAS_WEIGHT:
            y = y * w
        if HAS_BIAS:
            y = y + b
        tl.store(Y + start * n_cols + cols, y.to(Y.dtype.element_ty), mask=in_row)
        tl.store(MEAN + row, mean)
        tl.store(RSTD + row, rstd)


@triton.jit
def layer_norm_bwd_kernel(
    DY,
    DH,
    H,
    W,
    MEAN,
    RSTD,
    DX,
    DW_PARTIAL,
    DB_PARTIAL,
    n_rows,
    n_cols,
    stride_dy,
    stride_dh,
    stride_h,
    offset,
    HAS_DH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    in_row = cols < n_cols
    zero = tl.full((), 0, tl.int64)  # row offsets pass 2^31 elements
    if HAS_WEIGHT:
        w = tl.load(W + cols, mask=in_row, other=0.0).to(tl.float32) + offset
        w = w.to(W.dtype.element_ty)  # kept narrow: registers are scarce
    if NEEDS_DW:
        dw = tl.zeros((BLOCK,), dtype=tl.float32)
    if NEEDS_DB:
        db = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in tl.range(tl.program_id(0), n_rows, PROGRAMS, num_stages=STAGES):
        start = zero + row
        h = tl.load(H + start * stride_h + cols, mask=in_row, other=0.0).to(tl.float32)
        dy = tl.load(DY + start * stride_dy + cols, mask=in_row, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row)
        normed = (h - tl.load(MEAN + row)) * rstd
        if NEEDS_DW:
            dw += dy * normed
        if NEEDS_DB:
            db += dy
        if HAS_WEIGHT:
            dy = dy * w.to(tl.float32)
        dy = tl.where(in_row, dy - tl.sum(dy, 0) / n_cols, 0.0)
        along_normed = tl.sum(dy * normed, 0) / n_cols
        dx = (dy - normed * along_normed) * rstd
        if HAS_DH:
            dx += tl.load(DH + start * stride_dh + cols, mask=in_row, other=0.0).to(tl.float32)
        tl.store(DX + start * n_cols + cols, dx.to(DX.dtype.element_ty), mask=in_row)
    if NEEDS_DW:
        tl.store(DW_PARTIAL + tl.program_id(0) * n_cols + cols, dw, mask=in_row)
    if NEEDS_DB:
        tl.store(DB_PARTIAL + tl.program_id(0) * n_cols + cols, db, mask=in_row)


def forward(
    x_NH: torch.Tensor,
    residual_NH: torch.Tensor | None,
    weight_H: torch.Tensor | None,
    bias_H: torch.Tensor | None,
    eps: float,
    scale: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return y in h's dtype, h (None where there is no residual), and mean and rstd in float32."""
    n_rows, n_cols = x_NH.shape
    dtype = x_NH.dtype if residual_NH is None else torch.promote_types(x_NH.dtype, residual_NH.dtype)
    y_NH = torch.empty(n_rows, n_cols, dtype=dtype, device=x_NH.device)
    h_NH = None if residual_NH is None else torch.empty_like(y_NH)
    mean_N, rstd_N = (torch.empty(n_rows, dtype=torch.float32, device=x_NH.device) for _ in range(2))
    if n_rows == 0:
        return y_NH, h_NH, mean_N, rstd_N
    block = next_power_of_2(n_cols)
    programs = min(n_rows, persistent_programs(x_NH.device, PROGRAMS_PER_PROCESSOR))
    layer_norm_fwd_kernel[(programs,)](
        x_NH,
        residual_NH,
        None if weight_H is None else weight_H.contiguous(),
        None if bias_H is None else bias_H.contiguous(),
        y_NH,
        h_NH,
        mean_N,
        rstd_N,
        n_rows,
        n_cols,
        x_NH.stride(0),
        0 if residual_NH is None else residual_NH.stride(0),
        eps,
        scale,
        offset,
        HAS_RESIDUAL=residual_NH is not None,
        HAS_SCALE=scale != 1.0,
        HAS_WEIGHT=weight_H is not None,
        HAS_BIAS=bias_H is not None,
        BLOCK=block,
        PROGRAMS=programs,
        STAGES=prefetch_stages(block * _row_bytes(x_NH, residual_NH)),
        num_warps=row_warps(block),
        enable_fp_fusion=True,
    )
    return y_NH, h_NH, mean_N, rstd_N


def backward(
    grad_y_NH: torch.Tensor,
    grad_h_NH: torch.Tensor | None,
    h_NH: torch.Tensor,
    weight_H: torch.Tensor | None,
    mean_N: torch.Tensor,
    rstd_N: torch.Tensor,
    offset: float,
    needs_grad_weight: bool,
    needs_grad_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of h and of weight in their dtypes, that of bias in float32 (None where not needed)."""
    n_rows, n_cols = h_NH.shape
    grad_NH = torch.empty(n_rows, n_cols, dtype=h_NH.dtype, device=h_NH.device)
    block = next_power_of_2(n_cols)
    programs = min(n_rows, persistent_programs(h_NH.device, PROGRAMS_PER_PROCESSOR if block <= WIDE else 1))
    dw_PH, db_PH = (
        h_NH.new_empty(programs, n_cols, dtype=torch.float32) if needed else None
        for needed in (needs_grad_weight, needs_grad_bias)
    )
    if n_rows > 0:
        layer_norm_bwd_kernel[(programs,)](
            grad_y_NH,
            grad_h_NH,
            h_NH,
            None if weight_H is None else weight_H.contiguous(),
            mean_N,
            rstd_N,
            grad_NH,
            dw_PH,
            db_PH,
            n_rows,
            n_cols,
            grad_y_NH.stride(0),
            0 if grad_h_NH is None else grad_h_NH.stride(0),
            h_NH.stride(0),
            offset,
            HAS_DH=grad_h_NH is not None,
            HAS_WEIGHT=weight_H is not None,
            NEEDS_DW=dw_PH is not None,
            NEEDS_DB=db_PH is not None,
            BLOCK=block,
            PROGRAMS=programs,
            STAGES=prefetch_stages(block * _row_bytes(h_NH, grad_y_NH, grad_h_NH)),
            num_warps=min(row_warps(block), BACKWARD_WARPS),
            enable_fp_fusion=True,
        )
    grad_weight_H = None if dw_PH is None or weight_H is None else sum_partials(dw_PH, weight_H.dtype)
    return grad_NH, grad_weight_H, None if db_PH is None else sum_partials(db_PH, torch.float32)


def _row_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes that one element of a row takes in all of them."""
    return sum(tensor.element_size() for tensor in tensors if tensor is not None)
