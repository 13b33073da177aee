"""Cross entropy of a chunk of logits in Triton: the loss, and the gradient written over the logits.

Bytes per call, of the floor: the logits are read twice and written once, where the floor is one of each: a row of them does not
fit in registers. The second sweep walks backwards, so that what was read last is met first, in the L2 cache.
Each lane keeps its own maximum and sum; the lanes meet once, at the end of the first sweep. One program a row, no atomics.
Where the vocabulary is cut over ranks, the sweeps are two kernels, between which the ranks exchange what the first one found.
Shapes and letters as in eager.py.
"""

import torch
import triton
import triton.language as tl

from automodel_accel.kernels.launch import cdiv, next_power_of_2, persistent_programs

MAX_BLOCK = 2048  # 8 elements a thread, which is one word of 16 bytes where they take 2 bytes each
SCALE_BLOCK = 4096
SCALE_PROGRAMS_PER_PROCESSOR = 8


@triton.jit
def _tanh(x):
    # near 0, where 1 - 2 / (exp(2 x) + 1) would cancel, the polynomial of Cephes' tanhf
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def sweep(
    Z,
    origin,
    n_cols,
    limit,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(largest logit, sum of the exponentials above it, and in each lane a sum of the distances to `origin`) of the row at Z."""
    lanes = tl.arange(0, BLOCK)
    lane_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    lane_sum = tl.zeros((BLOCK,), tl.float32)
    lane_distance = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.cdiv(n_cols, BLOCK)):
        cols = block * BLOCK + lanes
        z = tl.load(Z + cols, mask=cols < limit, other=0.0).to(tl.float32) * scale
        if HAS_SOFTCAP:
            z = softcap * _tanh(z / softcap)
        if HAS_SMOOTHING:
            lane_distance += tl.where(cols < n_cols, z - origin, 0.0)
        z = tl.where(cols < n_cols, z, float("-inf"))
        rise = tl.where(z == lane_max, 0.0, z - lane_max)  # two infinities have no difference
        shrunk = tl.exp(-tl.abs(rise))
        lane_sum = tl.where(rise > 0, lane_sum * shrunk + 1.0, lane_sum + shrunk)
        lane_max = tl.where(rise > 0, z, lane_max)
    row_max = tl.max(lane_max, 0)
    total = tl.sum(lane_sum * tl.exp(lane_max - row_max), 0)
    return row_max, total, lane_distance


@triton.jit
def softmax_of_row(
    Z,
    target,
    n_cols,
    limit,
    scale,
    softcap,
    smoothing,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(loss, largest logit, sum of the exponentials above it, whether the target is a class) of the row at Z, read once.

    Access is masked by `limit`, at least n_cols; what lies beyond n_cols is never looked at.
    """
    is_class = (target >= 0) & (target < n_cols)
    tl.device_assert(is_class, "a target is no class")  # compiled only with TRITON_DEBUG=1
    target_logit = tl.load(Z + target, mask=is_class, other=float("nan")).to(tl.float32) * scale
    if HAS_SOFTCAP:
        target_logit = softcap * _tanh(target_logit / softcap)
    # the mean is taken of distances to a finite logit, so that large logits do not cancel
    origin = tl.where(tl.abs(target_logit) < float("inf"), target_logit, 0.0)
    row_max, total, lane_distance = sweep(Z, origin, n_cols, limit, scale, softcap, HAS_SOFTCAP, HAS_SMOOTHING, BLOCK)
    loss = tl.log(total) - (1.0 - smoothing) * (target_logit - row_max)
    if HAS_SMOOTHING:
        loss -= smoothing * (tl.sum(lane_distance, 0) / n_cols + (origin - row_max))
    return loss, row_max, total, is_class


@triton.jit
def differentiate(
    z,
    cols,
    target,
    n_cols,
    row_max,
    inverse,
    weight,
    softcap,
    smoothing,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    more=0.0,
    HAS_Z_LOSS: tl.constexpr = False,
):
    """The gradient at the columns whose logits, times the scale, are z; `inverse` divides the exponentials, `weight` times all.

    With a z-loss, `more` times the probabilities are added last: 1 + more - 1 would cancel at the target.
    """
    if HAS_SOFTCAP:
        capped = _tanh(z / softcap)
        z = softcap * capped
    grad = tl.exp(z - row_max) * inverse
    if HAS_Z_LOSS:
        added = grad * more
    if HAS_SMOOTHING:
        grad -= smoothing / n_cols
    grad = grad - tl.where(cols == target, 1.0 - smoothing, 0.0)
    if HAS_Z_LOSS:
        grad += added
    grad = grad * weight
    if HAS_SOFTCAP:
        grad *= 1.0 - capped * capped
    return grad


@triton.jit
def cross_entropy_kernel(
    Z,
    TARGET,
    WEIGHT,
    LOSS,
    n_cols,
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
    NEEDS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    zero = tl.full((), 0, tl.int64)  # row offsets pass 2^31 elements
    Z += (zero + row) * stride_z
    # access is masked by the row's stride, a multiple of 16 that keeps words wide
    lanes = tl.arange(0, BLOCK)
    n_blocks = tl.cdiv(n_cols, BLOCK)
    target = tl.load(TARGET + row)
    if target == ignore_index:
        tl.store(LOSS + row, 0.0)
        if NEEDS_GRAD:
            for block in range(n_blocks):
                cols = block * BLOCK + lanes
                tl.store(Z + cols, tl.zeros((BLOCK,), Z.dtype.element_ty), mask=cols < stride_z)
        return

    loss, row_max, total, is_class = softmax_of_row(
        Z, target, n_cols, stride_z, scale, softcap, smoothing, HAS_SOFTCAP, HAS_SMOOTHING, BLOCK
    )
    more = 0.0
    if HAS_Z_LOSS:
        lse = row_max + tl.log(total)
        loss += z_loss * lse * lse
        more = 2.0 * z_loss * lse
    tl.store(LOSS + row, loss)
    if NEEDS_GRAD:
        weight = tl.load(WEIGHT + row * stride_weight) * scale
        weight = tl.where(is_class, weight, float("nan"))
        inverse = 1.0 / total
        for turn in range(n_blocks):
            cols = (n_blocks - 1 - turn) * BLOCK + lanes
            z = tl.load(Z + cols, mask=cols < stride_z, other=0.0).to(tl.float32) * scale
            grad = differentiate(
                z,
                cols,
                target,
                n_cols,
                row_max,
                inverse,
                weight,
                softcap,
                smoothing,
                HAS_SOFTCAP,
                HAS_SMOOTHING,
                more,
                HAS_Z_LOSS,
            )
            tl.store(Z + cols, grad.to(Z.dtype.element_ty), mask=cols < stride_z)


@triton.jit
def shard_forward_kernel(
    Z,
    TARGET,
    PARTS,
    n_rows,
    n_cols,
    start,
    stride_z,
    scale,
    softcap,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    zero = tl.full((), 0, tl.int64)  # row offsets pass 2^31 elements
    Z += (zero + row) * stride_z
    LARGEST = PARTS + row
    TOTAL = LARGEST + n_rows
    TARGET_LOGIT = TOTAL + n_rows
    DISTANCE = TARGET_LOGIT + n_rows
    target = tl.load(TARGET + row)
    if target == ignore_index:
        tl.store(LARGEST, 0.0)
        tl.store(TOTAL, 0.0)
        tl.store(TARGET_LOGIT, 0.0)
        tl.store(DISTANCE, 0.0)
        return

    here = (target >= start) & (target < start + n_cols)
    target_logit = tl.load(Z + (target - start), mask=here, other=0.0).to(tl.float32) * scale
    origin = tl.load(Z).to(tl.float32) * scale
    if HAS_SOFTCAP:
        target_logit = softcap * _tanh(target_logit / softcap)
        origin = softcap * _tanh(origin / softcap)
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
    row_max, total, lane_distance = sweep(
        Z, origin, n_cols, stride_z, scale, softcap, HAS_SOFTCAP, HAS_SMOOTHING, BLOCK
    )
    tl.store(LARGEST, row_max)
    tl.store(TOTAL, tl.where(row_max == float("-inf"), 0.0, total))
    tl.store(TARGET_LOGIT, target_logit)
    if HAS_SMOOTHING:
        shift = tl.where(row_max == float("-inf"), 0.0, n_cols * (origin - row_max))
        tl.store(DISTANCE, tl.sum(lane_distance, 0) + shift)


@triton.jit
def shard_backward_kernel(
    Z,
    TARGET,
    WEIGHT,
    LARGEST,
    TOTAL,
    n_cols,
    start,
    vocab,
    stride_z,
    scale,
    softcap,
    ignore_index,
    smoothing,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    zero = tl.full((), 0, tl.int64)
    Z += (zero + row) * stride_z
    lanes = tl.arange(0, BLOCK)
    n_blocks = tl.cdiv(n_cols, BLOCK)
    target = tl.load(TARGET + row)
    if target == ignore_index:
        for block in range(n_blocks):
            cols = block * BLOCK + lanes
            tl.store(Z + cols, tl.zeros((BLOCK,), Z.dtype.element_ty), mask=cols < stride_z)
        return

    row_max = tl.load(LARGEST + row)
    inverse = 1.0 / tl.load(TOTAL + row)
    row_weight = tl.load(WEIGHT + row) * scale
    for block in range(n_blocks):
        cols = block * BLOCK + lanes
        z = tl.load(Z + cols, mask=cols < stride_z, other=0.0).to(tl.float32) * scale
        grad = differentiate(
            z,
            cols,
            target - start,
            vocab,
            row_max,
            inverse,
            row_weight,
            softcap,
            smoothing,
            HAS_SOFTCAP,
            HAS_SMOOTHING,
        )
        tl.store(Z + cols, grad.to(Z.dtype.element_ty), mask=cols < stride_z)


@triton.jit
def scale_kernel(X, FACTOR, n_elements, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    factor = tl.load(FACTOR)
    if factor != 1.0:
        zero = tl.full((), 0, tl.int64)
        for block in tl.range(tl.program_id(0), tl.cdiv(n_elements, BLOCK), PROGRAMS):
            offsets = (zero + block) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(X + offsets, mask=offsets < n_elements, other=0.0).to(tl.float32)
            tl.store(X + offsets, (x * factor).to(X.dtype.element_ty), mask=offsets < n_elements)


def forward(
    logits_CV: torch.Tensor,
    target_C: torch.Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> torch.Tensor:
    """Return the loss of each row in float32, 0 where the target is `ignore_index`, NaN where it is no class."""
    return _launch(logits_CV, target_C, None, scale, softcap, ignore_index, smoothing, z_loss)


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
    return _launch(logits_CV, target_C, weight_C, scale, softcap, ignore_index, smoothing, z_loss)


def shard_forward(
    logits_CV: torch.Tensor,
    target_C: torch.Tensor,
    start: int,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    smoothing: float,
) -> torch.Tensor:
    """Return what this rank knows of each row, [4, C]; see eager.py. The logits stay."""
    n_rows, n_cols = logits_CV.shape
    parts_4C = torch.zeros(4, n_rows, dtype=torch.float32, device=logits_CV.device)
    if n_rows == 0 or n_cols == 0:
        parts_4C[0] = float("-inf")
        return parts_4C
    shard_forward_kernel[(n_rows,)](
        logits_CV,
        target_C,
        parts_4C,
        n_rows,
        n_cols,
        start,
        logits_CV.stride(0),
        scale,
        1.0 if softcap is None else softcap,
        ignore_index,
        HAS_SOFTCAP=softcap is not None,
        HAS_SMOOTHING=smoothing > 0,
        BLOCK=min(next_power_of_2(n_cols), MAX_BLOCK),
        num_warps=8,
        enable_fp_fusion=True,
    )
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
    """Overwrite the logits with the gradient of sum(weight * loss) with respect to them; see eager.py."""
    n_rows, n_cols = logits_CV.shape
    if n_rows == 0 or n_cols == 0:
        return
    shard_backward_kernel[(n_rows,)](
        logits_CV,
        target_C,
        weight_C,
        largest_C,
        total_C,
        n_cols,
        start,
        vocab,
        logits_CV.stride(0),
        scale,
        1.0 if softcap is None else softcap,
        ignore_index,
        smoothing,
        HAS_SOFTCAP=softcap is not None,
        HAS_SMOOTHING=smoothing > 0,
        BLOCK=min(next_power_of_2(n_cols), MAX_BLOCK),
        num_warps=8,
        enable_fp_fusion=True,
    )


def scale_(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply contiguous `x` by a 0-d tensor, in place; nothing is read or written where it is 1."""
    if x.numel() == 0:
        return
    programs = min(cdiv(x.numel(), SCALE_BLOCK), persistent_programs(x.device, SCALE_PROGRAMS_PER_PROCESSOR))
    scale_kernel[(programs,)](
        x, factor, x.numel(), BLOCK=SCALE_BLOCK, PROGRAMS=programs, num_warps=4, enable_fp_fusion=True
    )


def _launch(
    logits_CV: torch.Tensor,
    target_C: torch.Tensor,
    weight_C: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> torch.Tensor:
    n_rows, n_cols = logits_CV.shape
    loss_C = torch.empty(n_rows, dtype=torch.float32, device=logits_CV.device)
    if n_rows == 0:
        return loss_C
    cross_entropy_kernel[(n_rows,)](
        logits_CV,
        target_C,
        weight_C,
        loss_C,
        n_cols,
        logits_CV.stride(0),
        0 if weight_C is None else weight_C.stride(0),
        scale,
        1.0 if softcap is None else softcap,
        ignore_index,
        smoothing,
        z_loss,
        HAS_SOFTCAP=softcap is not None,
        HAS_SMOOTHING=smoothing > 0,
        HAS_Z_LOSS=z_loss > 0,
        NEEDS_GRAD=weight_C is not None,
        BLOCK=min(next_power_of_2(n_cols), MAX_BLOCK),
        num_warps=8,
        enable_fp_fusion=True,
    )
    return loss_C
