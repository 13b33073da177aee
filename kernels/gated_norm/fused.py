"""`gated_rms_norm` in Triton: one pass forward, one pass backward.

Bytes per call, of the floor: forward 3 passes over [N, H] (read x and gate, write y) plus 4 N for rstd; backward 5 passes (read
x, gate and grad_output, write grad_x and grad_gate) plus 4 P H written and read once for the partial weight gradients of P
programs. Grid, prefetch and sums as in rms_norm: persistent, two programs a multiprocessor, no atomics.
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
def gated_rms_norm_fwd_kernel(
    X,
    GATE,
    W,
    Y,
    RSTD,
    n_rows,
    n_cols,
    stride_x,
    stride_gate,
    eps,
    SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    CAST_THEN_MUL: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    in_row = cols < n_cols
    zero = tl.full((), 0, tl.int64)  # row offsets pass 2^31 elements
    if HAS_WEIGHT:
        w = tl.load(W + cols, mask=in_row, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0), n_rows, PROGRAMS, num_stages=STAGES):
        start = zero + row
        x = tl.load(X + start * stride_x + cols, mask=in_row, other=0.0).to(tl.float32)
        gate = tl.load(GATE + start * stride_gate + cols, mask=in_row, other=0.0).to(tl.float32)
        activated = tl.sigmoid(gate)
        if SILU:
            activated = gate * activated
        if GATE_FIRST:
            x = x * activated
        rstd = tl.rsqrt(tl.sum(x * x, 0) / n_cols + eps)
        y = x * rstd
        if CAST_THEN_MUL:
            y = y.to(X.dtype.element_ty).to(tl.float32)
        if HAS_WEIGHT:
            y = y * w
            if ROUND_PRODUCT:
                y = y.to(X.dtype.element_ty).to(tl.float32)
        if not GATE_FIRST:
            y = y * activated
        tl.store(Y + start * n_cols + cols, y.to(Y.dtype.element_ty), mask=in_row)
        tl.store(RSTD + row, rstd)


@triton.jit
def _slope(gate, sigmoid, SILU: tl.constexpr):
    slope = sigmoid * (1.0 - sigmoid)
    if SILU:
        slope = sigmoid + gate * slope
    return slope


@triton.jit
def _sigmoid_again(gate):
    # tl.sigmoid, in a form that the compiler does not take for it: that one need not stay in registers until here
    return 1.0 / (1.0 + tl.exp2(gate * -1.4426950408889634))  # 1 / ln 2


@triton.jit
def gated_rms_norm_bwd_kernel(
    DY,
    X,
    GATE,
    W,
    RSTD,
    DX,
    DGATE,
    DW_PARTIAL,
    n_rows,
    n_cols,
    stride_dy,
    stride_x,
    stride_gate,
    SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_DW: tl.constexpr,
    CAST_THEN_MUL: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    in_row = cols < n_cols
    zero = tl.full((), 0, tl.int64)  # row offsets pass 2^31 elements
    if HAS_WEIGHT:
        w = tl.load(W + cols, mask=in_row, other=0.0)  # kept narrow: registers are scarce
    if NEEDS_DW:
        dw = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in tl.range(tl.program_id(0), n_rows, PROGRAMS, num_stages=STAGES):
        start = zero + row
        x = tl.load(X + start * stride_x + cols, mask=in_row, other=0.0).to(tl.float32)
        gate = tl.load(GATE + start * stride_gate + cols, mask=in_row, other=0.0).to(tl.float32)
        dy = tl.load(DY + start * stride_dy + cols, mask=in_row, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row)
        sigmoid = tl.sigmoid(gate)
        activated = sigmoid
        if SILU:
            activated = gate * sigmoid
        if GATE_FIRST:
            normed = x * activated * rstd
        else:
            normed = x * rstd
        factor = normed
        if CAST_THEN_MUL:
            factor = normed.to(X.dtype.element_ty).to(tl.float32)
        if not GATE_FIRST:
            product = factor
            if HAS_WEIGHT:
                product = factor * w.to(tl.float32)
                if ROUND_PRODUCT:
                    product = product.to(X.dtype.element_ty).to(tl.float32)
            dgate = dy * product * _slope(gate, sigmoid, SILU)
            tl.store(DGATE + start * n_cols + cols, dgate.to(DGATE.dtype.element_ty), mask=in_row)
            dy = dy * activated
        if NEEDS_DW:
            dw += dy * factor
        if HAS_WEIGHT:
            dy = dy * w.to(tl.float32)
        along_normed = tl.sum(dy * normed, 0) / n_cols
        if GATE_FIRST:
            sigmoid = _sigmoid_again(gate)
            activated = sigmoid
            if SILU:
                activated = gate * sigmoid
            normed = x * activated * rstd
        dx = (dy - normed * along_normed) * rstd
        if GATE_FIRST:
            dgate = dx * x * _slope(gate, sigmoid, SILU)
            tl.store(DGATE + start * n_cols + cols, dgate.to(DGATE.dtype.element_ty), mask=in_row)
            dx = dx * activated
        tl.store(DX + start * n_cols + cols, dx.to(DX.dtype.element_ty), mask=in_row)
    if NEEDS_DW:
        tl.store(DW_PARTIAL + tl.program_id(0) * n_cols + cols, dw, mask=in_row)


def forward(
    x_NH: torch.Tensor,
    gate_NH: torch.Tensor,
    weight_H: torch.Tensor | None,
    eps: float,
    activation: str,
    gate_first: bool,
    order: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [N, H] in `out_dtype`, and rstd [N] in float32."""
    n_rows, n_cols = x_NH.shape
    y_NH = torch.empty(n_rows, n_cols, dtype=out_dtype, device=x_NH.device)
    rstd_N = torch.empty(n_rows, dtype=torch.float32, device=x_NH.device)
    if n_rows == 0:
        return y_NH, rstd_N
    block = next_power_of_2(n_cols)
    programs = min(n_rows, persistent_programs(x_NH.device, PROGRAMS_PER_PROCESSOR))
    gated_rms_norm_fwd_kernel[(programs,)](
        x_NH,
        gate_NH,
        None if weight_H is None else weight_H.contiguous(),
        y_NH,
        rstd_N,
        n_rows,
        n_cols,
        x_NH.stride(0),
        gate_NH.stride(0),
        eps,
        SILU=activation == "silu",
        GATE_FIRST=gate_first,
        HAS_WEIGHT=weight_H is not None,
        CAST_THEN_MUL=order == "cast_then_mul",
        ROUND_PRODUCT=_rounds_product(x_NH, weight_H, order),
        BLOCK=block,
        PROGRAMS=programs,
        STAGES=prefetch_stages(block * 2 * x_NH.element_size()),
        num_warps=row_warps(block),
        enable_fp_fusion=True,
    )
    return y_NH, rstd_N


def backward(
    grad_output_NH: torch.Tensor,
    x_NH: torch.Tensor,
    gate_NH: torch.Tensor,
    weight_H: torch.Tensor | None,
    rstd_N: torch.Tensor,
    activation: str,
    gate_first: bool,
    order: str,
    needs_grad_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return grad_x and grad_gate [N, H] in x's dtype, and grad_weight [H] in the weight's (None where not needed)."""
    n_rows, n_cols = x_NH.shape
    grad_x_NH, grad_gate_NH = (torch.empty(n_rows, n_cols, dtype=x_NH.dtype, device=x_NH.device) for _ in range(2))
    block = next_power_of_2(n_cols)
    programs = min(n_rows, persistent_programs(x_NH.device, PROGRAMS_PER_PROCESSOR if block <= WIDE else 1))
    dw_PH = x_NH.new_empty(programs, n_cols, dtype=torch.float32) if needs_grad_weight else None
    if n_rows > 0:
        gated_rms_norm_bwd_kernel[(programs,)](
            grad_output_NH,
            x_NH,
            gate_NH,
            None if weight_H is None else weight_H.contiguous(),
            rstd_N,
            grad_x_NH,
            grad_gate_NH,
            dw_PH,
            n_rows,
            n_cols,
            grad_output_NH.stride(0),
            x_NH.stride(0),
            gate_NH.stride(0),
            SILU=activation == "silu",
            GATE_FIRST=gate_first,
            HAS_WEIGHT=weight_H is not None,
            NEEDS_DW=dw_PH is not None,
            CAST_THEN_MUL=order == "cast_then_mul",
            ROUND_PRODUCT=_rounds_product(x_NH, weight_H, order),
            BLOCK=block,
            PROGRAMS=programs,
            STAGES=prefetch_stages(block * (2 * x_NH.element_size() + grad_output_NH.element_size())),
            num_warps=min(row_warps(block), BACKWARD_WARPS),
            enable_fp_fusion=True,
        )
    if dw_PH is None or weight_H is None:
        return grad_x_NH, grad_gate_NH, None
    return grad_x_NH, grad_gate_NH, sum_partials(dw_PH, weight_H.dtype)


def _rounds_product(x_NH: torch.Tensor, weight_H: torch.Tensor | None, order: str) -> bool:
    """Whether the product with the weight is rounded to x's dtype: torch would keep it in the wider of the two."""
    same = weight_H is not None and torch.promote_types(x_NH.dtype, weight_H.dtype) == x_NH.dtype
    return same and order == "cast_then_mul"
