"""`cross_entropy` in Triton: one pass over the logits forward; one read and one write backward.

Bytes per call are the floor. Forward, one program walks a row with a maximum and a sum of its own in each lane. Backward needs
nothing but these two numbers of a row, so that a program takes a tile of it, and an ignored row is not read. The arithmetic of
a row is that of linear_cross_entropy (softmax_of_row, differentiate). Words are wide where V is a multiple of 16.
Shapes as in eager.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from automodel_accel.kernels.cross_entropy.shards import ShardedRows
from automodel_accel.kernels.launch import cdiv, next_power_of_2
from automodel_accel.kernels.linear_cross_entropy import fused
from automodel_accel.kernels.linear_cross_entropy.fused import MAX_BLOCK, differentiate, softmax_of_row
from automodel_accel.kernels.linear_cross_entropy.shard import Sharded

WARPS = 8


@triton.jit
def cross_entropy_fwd_kernel(
    Z,
    TARGET,
    LOSS,
    STATS,
    n_rows,
    n_cols,
    stride_z,
    scale,
    softcap,
    ignore_index,
    smoothing,
    z_loss,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    target = tl.load(TARGET + row)
    if target == ignore_index:
        tl.store(LOSS + row, 0.0)
        tl.store(STATS + row, 0.0)
        tl.store(STATS + n_rows + row, n_cols)
        return
    loss, row_max, total, _ = softmax_of_row(
        Z + row * stride_z,
        target,
        n_cols,
        n_cols,
        scale,
        softcap,
        smoothing,
        HAS_SOFTCAP,
        HAS_SMOOTHING,
        BLOCK,
    )
    if HAS_Z_LOSS:
        lse = row_max + tl.log(total)
        loss += z_loss * lse * lse
    tl.store(LOSS + row, loss)
    tl.store(STATS + row, row_max)
    tl.store(STATS + n_rows + row, total)


@triton.jit
def cross_entropy_bwd_kernel(
    Z,
    TARGET,
    WEIGHT,
    STATS,
    DZ,
    n_rows,
    n_cols,
    tiles_per_row,
    stride_z,
    stride_weight,
    scale,
    softcap,
    ignore_index,
    smoothing,
    z_loss,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // tiles_per_row).to(tl.int64)  # offsets pass 2^31 elements
    cols = (tl.program_id(0) % tiles_per_row) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < n_cols
    target = tl.load(TARGET + row)
    at = DZ + row * n_cols + cols
    if target == ignore_index:
        tl.store(at, tl.zeros((BLOCK,), DZ.dtype.element_ty), mask=in_row)
        return
    row_max = tl.load(STATS + row)
    total = tl.load(STATS + n_rows + row)
    weight = tl.load(WEIGHT + row * stride_weight) * scale
    weight = tl.where((target >= 0) & (target < n_cols), weight, float("nan"))
    inverse = 1.0 / total
    if HAS_Z_LOSS:
        inverse *= 1.0 + 2.0 * z_loss * (row_max + tl.log(total))
    z = tl.load(Z + row * stride_z + cols, mask=in_row, other=0.0).to(tl.float32) * scale
    grad = differentiate(
        z, cols, target, n_cols, row_max, inverse, weight, softcap, smoothing, HAS_SOFTCAP, HAS_SMOOTHING
    )
    tl.store(at, grad.to(DZ.dtype.element_ty), mask=in_row)


def forward(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each row, 0 where the target is `ignore_index`, NaN where it is no class; and stats."""
    n_rows, n_cols = logits_NV.shape
    loss_N = torch.empty(n_rows, dtype=torch.float32, device=logits_NV.device)
    stats_2N = torch.empty(2, n_rows, dtype=torch.float32, device=logits_NV.device)
    if n_rows == 0:
        return loss_N, stats_2N
    cross_entropy_fwd_kernel[(n_rows,)](
        logits_NV,
        target_N,
        loss_N,
        stats_2N,
        n_rows,
        n_cols,
        logits_NV.stride(0),
        scale,
        1.0 if softcap is None else softcap,
        ignore_index,
        smoothing,
        z_loss,
        HAS_SOFTCAP=softcap is not None,
        HAS_SMOOTHING=smoothing > 0,
        HAS_Z_LOSS=z_loss > 0,
        BLOCK=_block(n_cols),
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return loss_N, stats_2N


def backward(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    weight_N: torch.Tensor,
    stats_2N: torch.Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> torch.Tensor:
    """Return the gradient of sum(weight * loss) with respect to the logits, in their dtype; exactly 0 in an ignored row."""
    n_rows, n_cols = logits_NV.shape
    grad_NV = torch.empty(n_rows, n_cols, dtype=logits_NV.dtype, device=logits_NV.device)
    if grad_NV.numel() == 0:
        return grad_NV
    block = _block(n_cols)
    tiles_per_row = cdiv(n_cols, block)
    cross_entropy_bwd_kernel[(n_rows * tiles_per_row,)](
        logits_NV,
        target_N,
        weight_N,
        stats_2N,
        grad_NV,
        n_rows,
        n_cols,
        tiles_per_row,
        logits_NV.stride(0),
        weight_N.stride(0),
        scale,
        1.0 if softcap is None else softcap,
        ignore_index,
        smoothing,
        z_loss,
        HAS_SOFTCAP=softcap is not None,
        HAS_SMOOTHING=smoothing > 0,
        HAS_Z_LOSS=z_loss > 0,
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return grad_NV


def sharded(group: Any, start: int, vocab: int) -> ShardedRows:
    """The same two functions where this rank has the classes from `start` on of `vocab`, and the group's others the rest."""
    return ShardedRows(Sharded(fused, group, start, vocab))


def _block(n_cols: int) -> int:
    block: int = min(next_power_of_2(n_cols), MAX_BLOCK)
    return block
