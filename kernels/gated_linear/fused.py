"""`gated_linear` in Triton: one pass forward, one pass backward.

Bytes per call are the floor: forward 3 passes over [N, F] (read gate and up, write y), backward 5 (read grad_output, gate and
up, write two gradients). Tiles of 1024 elements, 8 a thread: one 16-byte load for each tensor in bfloat16, and so few registers
that 10 programs or more share a multiprocessor, which is what keeps enough bytes in flight. Contiguous tensors are one long
row, so that no tile is cut off by the end of a row; strided rows have tiles of their own, and so has an output of which the
largest values are noted (fp8_linear/noted.py). Where its cast is, a tile is a whole row. Shapes as in eager.py.
"""

import torch
import triton
import triton.language as tl

from automodel_accel.kernels.activation.fused import activate
from automodel_accel.kernels.fp8_linear import noted
from automodel_accel.kernels.fp8_linear.noted_fused import note_row
from automodel_accel.kernels.launch import cdiv, next_power_of_2, row_warps
from automodel_accel.kernels.room import empty_rows

BLOCK = 1024
WARPS = 4
LONGEST = 16384  # of the rows that one program casts


@triton.jit
def gated_linear_fwd_kernel(
    GATE,
    UP,
    Y,
    AMAX,
    Q,
    SCALE,
    n_cols,
    tiles_per_row,
    stride_gate,
    stride_up,
    stride_y,
    ACTIVATION: tl.constexpr,
    HAS_AMAX: tl.constexpr,
    HAS_Q: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    row = (tile // tiles_per_row).to(tl.int64)  # offsets pass 2^31 elements
    cols = (tile % tiles_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < n_cols
    gate = tl.load(GATE + row * stride_gate + cols, mask=in_row, other=0.0).to(tl.float32)
    up = tl.load(UP + row * stride_up + cols, mask=in_row, other=0.0).to(tl.float32)
    activated, _ = activate(gate, ACTIVATION)
    y = activated.to(GATE.dtype.element_ty).to(tl.float32) * up
    tl.store(Y + row * stride_y + cols, y.to(Y.dtype.element_ty), mask=in_row)
    if HAS_AMAX:  # with the cast a tile is a row
        note_row(y, Y, in_row, cols, tile.to(tl.int64), n_cols, AMAX, Q, SCALE, HAS_Q, EXPONENT, MANTISSA)


@triton.jit
def gated_linear_bwd_kernel(
    DY,
    GATE,
    UP,
    DGATE,
    DUP,
    n_cols,
    tiles_per_row,
    stride_dy,
    stride_gate,
    stride_up,
    stride_dgate,
    stride_dup,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    row = (tile // tiles_per_row).to(tl.int64)  # offsets pass 2^31 elements
    cols = (tile % tiles_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < n_cols
    dy = tl.load(DY + row * stride_dy + cols, mask=in_row, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * stride_gate + cols, mask=in_row, other=0.0).to(tl.float32)
    up = tl.load(UP + row * stride_up + cols, mask=in_row, other=0.0).to(tl.float32)
    activated, slope = activate(gate, ACTIVATION)
    dgate = dy * up * slope
    dup = dy * activated.to(GATE.dtype.element_ty).to(tl.float32)
    tl.store(DGATE + row * stride_dgate + cols, dgate.to(DGATE.dtype.element_ty), mask=in_row)
    tl.store(DUP + row * stride_dup + cols, dup.to(DUP.dtype.element_ty), mask=in_row)


def forward(gate_NF: torch.Tensor, up_NF: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(gate) * up, [N, F]."""
    y_NF = empty_rows(gate_NF.shape[0], gate_NF.shape[1], gate_NF.dtype, gate_NF.device)
    wish = noted.wanted(y_NF.device.type)
    n_rows, n_cols = _rows_and_cols(gate_NF, up_NF, y_NF) if wish is None else y_NF.shape
    if y_NF.numel() == 0:
        return y_NF
    in_one = wish is not None and wish.dtype is not None and n_cols <= LONGEST
    block = next_power_of_2(n_cols) if in_one else BLOCK
    tiles_per_row = cdiv(n_cols, block)
    notes = noted.slots(y_NF, wish, tiles_per_row)
    gated_linear_fwd_kernel[(n_rows * tiles_per_row,)](
        gate_NF,
        up_NF,
        y_NF,
        *notes.pointers(),
        n_cols,
        tiles_per_row,
        gate_NF.stride(0),
        up_NF.stride(0),
        y_NF.stride(0),
        ACTIVATION=activation,
        **notes.constants(),
        BLOCK=block,
        num_warps=row_warps(block),
        enable_fp_fusion=True,
    )
    noted.leave(y_NF, notes)
    return y_NF


def backward(
    grad_output_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    activation: str,
    grad_gate_NF: torch.Tensor,
    grad_up_NF: torch.Tensor,
) -> None:
    """Write the gradients of gate and up into the last two arguments."""
    tensors = (grad_output_NF, gate_NF, up_NF, grad_gate_NF, grad_up_NF)
    n_rows, n_cols = _rows_and_cols(*tensors)
    if gate_NF.numel() == 0:
        return
    tiles_per_row = cdiv(n_cols, BLOCK)
    gated_linear_bwd_kernel[(n_rows * tiles_per_row,)](
        *tensors,
        n_cols,
        tiles_per_row,
        *(x.stride(0) for x in tensors),
        ACTIVATION=activation,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def _rows_and_cols(*tensors_NF: torch.Tensor) -> tuple[int, int]:
    """[N, F], or [1, N F] where every tensor is contiguous."""
    n_rows, n_cols = tensors_NF[0].shape
    return (1, n_rows * n_cols) if all(x.is_contiguous() for x in tensors_NF) else (n_rows, n_cols)
