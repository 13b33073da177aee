"""`activation` in Triton: one pass forward, one pass backward; and the formulas, which every kernel that activates shares.

Bytes per call are the floor: forward 2 passes over [N, F], backward 3. Tiles of 1024 elements, as in gated_linear. Contiguous
tensors are one long row, so that no tile is cut off by the end of a row. Shapes as in eager.py.
"""

import torch
import triton
import triton.language as tl

from automodel_accel.kernels.launch import cdiv
from automodel_accel.kernels.room import empty_rows

BLOCK = 1024
WARPS = 4


@triton.jit
def sigmoid_and_slope(z):
    """sigmoid(z) and its derivative sigmoid(z) (1 - sigmoid(z)), without the cancellation in 1 - sigmoid(z)."""
    small = tl.exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + small)
    return tl.where(z >= 0, inverse, small * inverse), small * inverse * inverse


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """activation(x) and its derivative; the compiler drops what is not used."""
    if ACTIVATION == "relu":
        activated = tl.where(x <= 0.0, 0.0, x)  # NaN stays NaN
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        positive = tl.where(x <= 0.0, 0.0, x)
        activated = positive * positive
        slope = 2.0 * positive
    else:
        if ACTIVATION == "silu":
            share, share_slope = sigmoid_and_slope(x)
        elif ACTIVATION == "quick_gelu":
            share, slope_z = sigmoid_and_slope(1.702 * x)
            share_slope = 1.702 * slope_z
        elif ACTIVATION == "gelu":
            share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # 1 / sqrt(2)
            share_slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
        else:
            # (1 + tanh(z)) / 2 = sigmoid(2 z), with z = sqrt(2 / pi) (x + 0.044715 x^3)
            share, slope_2z = sigmoid_and_slope(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
            share_slope = slope_2z * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        activated = x * share
        slope = share + x * share_slope
    return activated, slope


@triton.jit
def differentiate(dy, x, ACTIVATION: tl.constexpr):
    """dy * activation'(x)."""
    _, slope = activate(x, ACTIVATION)
    dx = dy * slope
    if ACTIVATION == "relu" or ACTIVATION == "relu2":
        dx = tl.where(x <= 0.0, 0.0, dx)  # torch selects: a NaN in dy goes no further here
    return dx


@triton.jit
def activation_fwd_kernel(
    X,
    Y,
    n_cols,
    tiles_per_row,
    stride_x,
    stride_y,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    row = (tile // tiles_per_row).to(tl.int64)  # offsets pass 2^31 elements
    cols = (tile % tiles_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < n_cols
    x = tl.load(X + row * stride_x + cols, mask=in_row, other=0.0).to(tl.float32)
    activated, _ = activate(x, ACTIVATION)
    tl.store(Y + row * stride_y + cols, activated.to(Y.dtype.element_ty), mask=in_row)


@triton.jit
def activation_bwd_kernel(
    DY,
    X,
    DX,
    n_cols,
    tiles_per_row,
    stride_dy,
    stride_x,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    row = (tile // tiles_per_row).to(tl.int64)  # offsets pass 2^31 elements
    cols = (tile % tiles_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < n_cols
    dy = tl.load(DY + row * stride_dy + cols, mask=in_row, other=0.0).to(tl.float32)
    x = tl.load(X + row * stride_x + cols, mask=in_row, other=0.0).to(tl.float32)
    dx = differentiate(dy, x, ACTIVATION)
    tl.store(DX + row * n_cols + cols, dx.to(DX.dtype.element_ty), mask=in_row)


def forward(x_NF: torch.Tensor, name: str) -> torch.Tensor:
    """Return name(x), [N, F]."""
    y_NF = empty_rows(x_NF.shape[0], x_NF.shape[1], x_NF.dtype, x_NF.device)
    n_rows, n_cols = _rows_and_cols(x_NF, y_NF)
    if y_NF.numel() == 0:
        return y_NF
    tiles_per_row = cdiv(n_cols, BLOCK)
    activation_fwd_kernel[(n_rows * tiles_per_row,)](
        x_NF,
        y_NF,
        n_cols,
        tiles_per_row,
        x_NF.stride(0),
        y_NF.stride(0),
        ACTIVATION=name,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return y_NF


def backward(grad_output_NF: torch.Tensor, kept_NF: torch.Tensor, name: str) -> torch.Tensor:
    """Return the gradient of x, [N, F], from x, or for relu from y."""
    grad_x_NF = torch.empty(kept_NF.shape, dtype=kept_NF.dtype, device=kept_NF.device)
    n_rows, n_cols = _rows_and_cols(grad_output_NF, kept_NF)
    if grad_x_NF.numel() == 0:
        return grad_x_NF
    tiles_per_row = cdiv(n_cols, BLOCK)
    activation_bwd_kernel[(n_rows * tiles_per_row,)](
        grad_output_NF,
        kept_NF,
        grad_x_NF,
        n_cols,
        tiles_per_row,
        grad_output_NF.stride(0),
        kept_NF.stride(0),
        ACTIVATION=name,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return grad_x_NF


def _rows_and_cols(*tensors_NF: torch.Tensor) -> tuple[int, int]:
    """[N, F], or [1, N F] where every tensor is contiguous."""
    n_rows, n_cols = tensors_NF[0].shape
    return (1, n_rows * n_cols) if all(x.is_contiguous() for x in tensors_NF) else (n_rows, n_cols)
