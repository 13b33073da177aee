"""Cross entropy of a chunk of logits out of torch operations: any device, any dtype.

The chunk is worked off in blocks of rows that stay in the cache, so that memory is read once and written once. Every step is
in place: float32 and float64 logits need no further memory, narrower ones a float32 copy of one block.
Shapes: logits [C, V]; target, weight and loss [C]. Where the vocabulary is cut over ranks, V are this rank's classes.
"""

from collections.abc import Iterator

import torch

CPU_BLOCK_BYTES = 2 << 20  # in float32; fits the second-level cache
GPU_BLOCK_BYTES = 64 << 20
SCALE_BLOCK = 1 << 20  # elements that are widened at a time


def forward(
    logits_CV: torch.Tensor,
    target_C: torch.Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> torch.Tensor:
    """Return the loss of each row in the compute dtype, 0 where the target is `ignore_index`. The logits are used up."""
    return _in_blocks(logits_CV, target_C, None, scale, softcap, ignore_index, smoothing, z_loss)


def backward(
    logits_CV: torch.Tensor,
    target_C: torch.Tensor,
    weight_C: torch.Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> torch.Tensor:
    """Return what `forward` does, and overwrite the logits with the gradient of sum(weight * loss) with respect to them."""
    return _in_blocks(logits_CV, target_C, weight_C, scale, softcap, ignore_index, smoothing, z_loss)


def shard_forward(
    logits_CV: torch.Tensor,
    target_C: torch.Tensor,
    start: int,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    smoothing: float,
) -> torch.Tensor:
    """Return what this rank knows of each row, in the compute dtype; the logits, of the classes from `start` on, stay.

    It is [4, C]: the largest logit (-inf for no class), the sum of the exponentials above it, the target's logit (0 where it is
    another rank's), and with smoothing the sum of the distances to the largest logit.
    """
    compute_dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    parts_4C = logits_CV.new_zeros((4, logits_CV.shape[0]), dtype=compute_dtype)
    if logits_CV.numel() == 0:
        parts_4C[0] = float("-inf")
        return parts_4C
    for rows in _blocks(logits_CV, compute_dtype):
        z = logits_CV[rows].to(compute_dtype, copy=True)
        ignored = (target_C[rows] == ignore_index)[:, None]
        local, here = _own_class(target_C[rows], ignored, start, z.shape[1])
        cap_(z, ignored, scale, softcap, needs_slope=False)
        largest = z.amax(1, keepdim=True)
        parts_4C[0, rows] = largest[:, 0]
        parts_4C[2, rows] = z.gather(1, local).masked_fill_(~here, 0.0)[:, 0]
        z.sub_(largest.masked_fill(largest == float("-inf"), 0.0))  # two infinities have no difference
        if smoothing:
            parts_4C[3, rows] = z.sum(1)
        parts_4C[1, rows] = z.exp_().sum(1)
    return parts_4C


def shard_backward(
    logits_CV: torch.Tensor,
    target_C: torch.Tensor,
    weight_C: torch.Tensor,
    largest_C: torch.Tensor,
    total_C: torch.Tensor,
    start: int,
    vocab: int,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    smoothing: float,
) -> None:
    """Overwrite the logits of the classes from `start` on with the gradient of sum(weight * loss) with respect to them.

    `largest_C` and `total_C` are of the whole vocabulary, of length `vocab`: the largest logit, and the sum of the exponentials above it.
    """
    if logits_CV.numel() == 0:
        return
    for rows in _blocks(logits_CV, largest_C.dtype):
        z = logits_CV[rows].to(largest_C.dtype)
        ignored = (target_C[rows] == ignore_index)[:, None]
        local, here = _own_class(target_C[rows], ignored, start, z.shape[1])
        cap_slope = cap_(z, ignored, scale, softcap, needs_slope=True)
        z.sub_(largest_C[rows, None]).exp_().div_(total_C[rows, None])
        if smoothing:
            z.sub_(smoothing / vocab)
        z.scatter_add_(1, local, here * z.new_full((), smoothing - 1.0))
        z.mul_(weight_C[rows, None] * scale)
        if cap_slope is not None:
            z.mul_(cap_slope)
        z.masked_fill_(ignored, 0.0)
        if z.dtype != logits_CV.dtype:
            logits_CV[rows] = z


def _own_class(
    target: torch.Tensor, ignored: torch.Tensor, start: int, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's place among this rank's classes, 0 where it is none of them; and whether it is one; [rows, 1] each."""
    local = target[:, None] - start
    here = (local >= 0) & (local < classes) & ~ignored
    return local.masked_fill(~here, 0), here


def scale_(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply contiguous `x` by a 0-d tensor, in place; the product is rounded once."""
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return
    if x.dtype == factor.dtype:
        x.mul_(factor)
        return
    for block in torch.split(x.view(-1), SCALE_BLOCK):  # torch would round the factor to the dtype of x
        block.copy_(block.to(factor.dtype).mul_(factor))


def _in_blocks(
    logits_CV: torch.Tensor,
    target_C: torch.Tensor,
    weight_C: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> torch.Tensor:
    compute_dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    loss_C = logits_CV.new_empty(logits_CV.shape[0], dtype=compute_dtype)
    for rows in _blocks(logits_CV, compute_dtype):
        weight = None if weight_C is None else weight_C[rows]
        wide = logits_CV[rows].to(compute_dtype)  # the block itself where it is wide already
        loss_C[rows] = _block_(wide, target_C[rows], weight, scale, softcap, ignore_index, smoothing, z_loss)
        if weight is not None and wide.dtype != logits_CV.dtype:
            logits_CV[rows] = wide
    return loss_C


def _blocks(logits_CV: torch.Tensor, compute_dtype: torch.dtype) -> Iterator[slice]:
    block_bytes = CPU_BLOCK_BYTES if logits_CV.device.type == "cpu" else GPU_BLOCK_BYTES
    size = max(1, block_bytes // (logits_CV.shape[1] * compute_dtype.itemsize))
    return (slice(start, start + size) for start in range(0, logits_CV.shape[0], size))


def _block_(
    z: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> torch.Tensor:
    """Return the loss of each row; overwrite z [rows, V] with its gradient where there is a weight, with anything else where not."""
    ignored = (target == ignore_index)[:, None]
    target = target[:, None].masked_fill(ignored, 0)
    slope = cap_(z, ignored, scale, softcap, needs_slope=weight is not None)
    loss, largest, total = softmax_(z, target, ignored, smoothing)
    if z_loss:
        lse = largest + total.log()
        loss += (z_loss * lse.square()).masked_fill_(ignored, 0.0)
    if weight is not None:
        z.div_(total)
        more = 2.0 * z_loss * lse if z_loss else None
        differentiate_(z, target, weight[:, None].masked_fill(ignored, 0.0) * scale, smoothing, slope, more)
    return loss[:, 0]


def cap_(
    z: torch.Tensor, ignored: torch.Tensor, scale: float, softcap: float | None, needs_slope: bool
) -> torch.Tensor | None:
    """Scale and cap logits in place, ignored rows being 0; return the cap's slope where there is one and it is needed."""
    z.masked_fill_(ignored, 0.0)  # what an ignored row holds, NaN even, goes nowhere
    if scale != 1.0:
        z.mul_(scale)
    if softcap is None:
        return None
    z.div_(softcap).tanh_()
    slope = 1.0 - z * z if needs_slope else None
    z.mul_(softcap)
    return slope


def softmax_(
    z: torch.Tensor, target: torch.Tensor, ignored: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn z into exp(z - maximum); return the loss, the maximum and the sum of each row, [rows, 1]."""
    largest = z.amax(1, keepdim=True)
    z.sub_(largest)
    loss = (smoothing - 1.0) * z.gather(1, target)
    if smoothing:
        loss -= smoothing * z.mean(1, keepdim=True)
    total = z.exp_().sum(1, keepdim=True)
    return (loss + total.log()).masked_fill_(ignored, 0.0), largest, total


def differentiate_(
    z: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    smoothing: float,
    slope: torch.Tensor | None,
    more: torch.Tensor | None = None,
) -> None:
    """Turn probabilities into the gradient of the logits, in place; `weight` [rows, 1] holds the scale, 0 where ignored.

    With `more` [rows, 1], that many times the probabilities are added.
    """
    if more is not None:
        own = z.gather(1, target)
        z.mul_(1.0 + more).scatter_(1, target, own)  # the target's own comes last: 1 + more - 1 would cancel
    if smoothing:
        z.sub_(smoothing / z.shape[1])
    z.scatter_(1, target, z.gather(1, target) - (1.0 - smoothing))
    if more is not None:
        z.scatter_add_(1, target, own * more)
    z.mul_(weight)
    if slope is not None:
        z.mul_(slope)
