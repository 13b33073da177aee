"""Plausible mistakes in cross_entropy: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

FUSED = "cross_entropy/fused.py"
EAGER = "cross_entropy/eager.py"
HOST = "cross_entropy/__init__.py"

KERNELS = (
    Mutant(
        FUSED, "        tl.store(LOSS + row, 0.0)\n", "        tl.store(LOSS + row, 1.0)\n", "an ignored row has a loss"
    ),
    Mutant(FUSED, "loss += z_loss * lse * lse", "loss += z_loss * lse", "the z-loss not squared"),
    Mutant(FUSED, "lse = row_max + tl.log(total)", "lse = tl.log(total)", "the maximum forgotten in the z-loss"),
    Mutant(
        FUSED,
        "    tl.store(STATS + row, row_max)\n",
        "    tl.store(STATS + row, row_max + 1.0)\n",
        "another maximum saved",
    ),
    Mutant(
        FUSED, "row = tl.program_id(0).to(tl.int64)", "row = (tl.program_id(0) // 2).to(tl.int64)", "every other row"
    ),
    Mutant(FUSED, "Z + row * stride_z,\n", "Z + row * n_cols,\n", "strided logits read as if they were contiguous"),
    Mutant(FUSED, "Z + row * stride_z + cols", "Z + row * n_cols + cols", "the same in backward"),
    Mutant(
        FUSED,
        "tl.zeros((BLOCK,), DZ.dtype.element_ty)",
        "tl.full((BLOCK,), 1.0, DZ.dtype.element_ty)",
        "an ignored row has a gradient",
    ),
    Mutant(FUSED, "tl.load(STATS + n_rows + row)", "tl.load(STATS + n_rows)", "the first row's sum for all"),
    Mutant(
        FUSED,
        "tl.load(WEIGHT + row * stride_weight) * scale",
        "tl.load(WEIGHT + row * stride_weight)",
        "the scale forgotten",
    ),
    Mutant(FUSED, "tl.load(WEIGHT + row * stride_weight)", "tl.load(WEIGHT)", "the first row's weight for all"),
    Mutant(FUSED, 'weight, float("nan"))', "weight, weight)", "a finite gradient for no class"),
    Mutant(FUSED, "(target >= 0) & (target < n_cols)", "(target < n_cols)", "a negative target has a gradient"),
    Mutant(FUSED, "1.0 + 2.0 * z_loss", "1.0 + z_loss", "half the gradient of the z-loss"),
    Mutant(
        FUSED, "z_loss * (row_max + tl.log(total))", "z_loss * tl.log(total)", "the maximum forgotten in its gradient"
    ),
    Mutant(FUSED, "other=0.0).to(tl.float32) * scale", "other=0.0).to(tl.float32)", "logits not scaled in backward"),
    Mutant(FUSED, "% tiles_per_row) * BLOCK", "% tiles_per_row // 2) * BLOCK", "a tile left out"),
)

ROWS = (
    Mutant(
        EAGER, "    loss_N[rows], stats_2N", "    loss_N[: len(loss)], stats_2N", "losses of all blocks in the first"
    ),
    Mutant(
        EAGER,
        "loss += (z_loss * (largest + total.log()).square())",
        "loss += (z_loss * (largest + total.log()))",
        "the z-loss not squared",
    ),
    Mutant(EAGER, ".square()).masked_fill_(ignored, 0.0)", ".square())", "an ignored row has a z-loss"),
    Mutant(EAGER, "largest[:, 0], total[:, 0]", "largest[:, 0] + 1.0, total[:, 0]", "another maximum saved"),
    Mutant(EAGER, "z.sub_(largest).exp_().div_(total)", "z.exp_().div_(total)", "no maximum taken off"),
    Mutant(EAGER, ".exp_().div_(total)", ".exp_()", "not normalised"),
    Mutant(EAGER, "1.0 + 2.0 * z_loss", "1.0 + z_loss", "half the gradient of the z-loss"),
    Mutant(
        EAGER,
        "weight_N[rows][:, None].masked_fill(ignored, 0.0) * scale",
        "weight_N[rows][:, None] * scale",
        "an ignored row has a gradient",
    ),
    Mutant(EAGER, ".masked_fill(ignored, 0.0) * scale", ".masked_fill(ignored, 0.0)", "the scale forgotten"),
    Mutant(
        EAGER,
        "cap_(z, ignored, scale, softcap, needs_slope=True)",
        "cap_(z, ignored, scale, softcap, needs_slope=False)",
        "the cap has no slope",
    ),
    Mutant(
        EAGER, "logits_NV[rows].to(dtype, copy=True)", "logits_NV[rows].to(dtype)", "the caller's logits overwritten"
    ),
    Mutant(EAGER, "    grad_NV[rows] = z\n", "    grad_NV[: len(z)] = z\n", "gradients of all blocks in the first"),
)

HOST_CODE = (
    Mutant(
        HOST,
        "torch.where(counts_N, token_weight.reshape(-1).to(dtype), 0.0)",
        "token_weight.reshape(-1).to(dtype)",
        "weights of ignored tokens",
    ),
    Mutant(HOST, "torch.where(target_N == ignore_index, 0.0, loss_N * weight_N)", "loss_N", "losses not weighted"),
    Mutant(
        HOST,
        "counts_N.sum().to(dtype) if weight_N is None else weight_N.sum()",
        "counts_N.sum().to(dtype)",
        "a weighted mean over the count",
    ),
    Mutant(
        HOST,
        "    counts_N = target_N != ignore_index\n",
        "    counts_N = target_N != -100\n",
        "one index ignored, whatever is asked",
    ),
    Mutant(HOST, "weight_N, num_items.to(", "weight_N, counts_N.sum().to(", "num_items ignored"),
    Mutant(HOST, "else weight * weight_N", "else weight.expand(target_N.shape)", "gradients not weighted"),
    Mutant(HOST, "else grad_output) / divisor", "else grad_output)", "gradients not divided"),
    Mutant(HOST, "loss_N.sum() / divisor", "loss_N.sum()", "the sum for the mean"),
    Mutant(
        HOST,
        'check_targets("cross_entropy", target, ',
        'check_targets("cross_entropy", target[:0], ',
        "targets not looked at",
    ),
)

MUTANTS = (*KERNELS, *ROWS, *HOST_CODE)
