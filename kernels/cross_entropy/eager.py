"""`cross_entropy` out of torch operations: any device, any dtype; no more than a block of rows is ever float32.

The rows of a block stay in the cache while they are worked on, so that memory is read once, and in backward written once.
Shapes: logits [N, V]; target, weight and loss [N]; stats [2, N], the largest logit of a row and the sum of the exponentials
above it, 0 and V for a row that is ignored. Two numbers, because their lse would round large logits.
"""

from collections.abc import Iterator
from typing import Any

import torch

from automodel_accel.kernels.cross_entropy.shards import ShardedRows
from automodel_accel.kernels.linear_cross_entropy import eager
from automodel_accel.kernels.linear_cross_entropy.eager import (
    CPU_BLOCK_BYTES,
    GPU_BLOCK_BYTES,
    cap_,
    differentiate_,
    softmax_,
)
from automodel_accel.kernels.linear_cross_entropy.shard import Sharded


def forward(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each row, 0 where the target is `ignore_index`, and stats; both in the compute dtype."""
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    loss_N = logits_NV.new_empty(logits_NV.shape[0], dtype=dtype)
    stats_2N = logits_NV.new_empty((2, logits_NV.shape[0]), dtype=dtype)
    for rows, z in _blocks(logits_NV, dtype):
        ignored = (target_N[rows] == ignore_index)[:, None]
        cap_(z, ignored, scale, softcap, needs_slope=False)
        loss, largest, total = softmax_(z, target_N[rows][:, None].masked_fill(ignored, 0), ignored, smoothing)
        if z_loss:
            loss += (z_loss * (largest + total.log()).square()).masked_fill_(ignored, 0.0)
        loss_N[rows], stats_2N[0, rows], stats_2N[1, rows] = loss[:, 0], largest[:, 0], total[:, 0]
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
    grad_NV = torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
    for rows, z in _blocks(logits_NV, stats_2N.dtype):
        ignored = (target_N[rows] == ignore_index)[:, None]
        slope = cap_(z, ignored, scale, softcap, needs_slope=True)
        largest, total = stats_2N[:, rows, None]
        z.sub_(largest).exp_().div_(total)
        if z_loss:
            z.mul_(1.0 + 2.0 * z_loss * (largest + total.log()))
        weight = weight_N[rows][:, None].masked_fill(ignored, 0.0) * scale
        differentiate_(z, target_N[rows][:, None].masked_fill(ignored, 0), weight, smoothing, slope)
        grad_NV[rows] = z
    return grad_NV


def sharded(group: Any, start: int, vocab: int) -> ShardedRows:
    """The same two functions where this rank has the classes from `start` on of `vocab`, and the group's others the rest."""
    return ShardedRows(Sharded(eager, group, start, vocab))


def _blocks(logits_NV: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows, each with a copy that may be written to: the logits are the caller's."""
    block_bytes = CPU_BLOCK_BYTES if logits_NV.device.type == "cpu" else GPU_BLOCK_BYTES
    size = max(1, block_bytes // (max(logits_NV.shape[1], 1) * dtype.itemsize))
    for start in range(0, logits_NV.shape[0], size):
        rows = slice(start, start + size)
        yield rows, logits_NV[rows].to(dtype, copy=True)
