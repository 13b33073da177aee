"""Plausible mistakes in linear_cross_entropy of a vocabulary that is cut over ranks."""

from tests.ops.mutation import Mutant

FUSED = "linear_cross_entropy/fused.py"
EAGER = "linear_cross_entropy/eager.py"
SHARD = "linear_cross_entropy/shard.py"

TOGETHER = (
    Mutant(
        SHARD,
        "dist.all_gather(list(parts_W5C.unbind()), parts_5C, group=self.group)",
        "parts_W5C.copy_(parts_5C)",
        "no collective: each rank takes the others for itself",
    ),
    Mutant(SHARD, "largest_WC.amax(0)", "largest_WC[0]", "the first rank's maximum for all"),
    Mutant(SHARD, "total_WC * below_WC.exp()", "total_WC", "sums added at different scales"),
    Mutant(SHARD, "(target_WC.sum(0) - largest_C)", "(target_WC[0] - largest_C)", "the target looked for on one rank"),
    Mutant(SHARD, "distance_WC + columns_WC * below_WC", "distance_WC", "distances to different maxima"),
    Mutant(
        SHARD,
        "torch.where(columns_WC > 0, distance_WC + columns_WC * below_WC, 0.0)",
        "distance_WC + columns_WC * below_WC",
        "a rank without classes: nothing times infinity",
    ),
    Mutant(
        SHARD,
        "smoothing / self.vocab * ",
        "smoothing / max(logits_CV.shape[1], 1) * ",
        "a mean over this rank's classes",
    ),
    Mutant(SHARD, "target_C, self.start, scale", "target_C, 0, scale", "every rank looks at the first classes"),
    Mutant(SHARD, "self.start, self.vocab, *options", "0, self.vocab, *options", "the gradient at the first classes"),
    Mutant(SHARD, "self.start, self.vocab, *options", "self.start, logits_CV.shape[1], *options", "smoothed too much"),
    Mutant(
        SHARD, "torch.where(self.is_class(target_C), weight_C, torch.nan)", "weight_C + 0.0", "a gradient for no class"
    ),
    Mutant(SHARD, "torch.where(self.is_class(target_C), loss_C, torch.nan)", "loss_C", "a loss for no class"),
    Mutant(SHARD, "loss_C.masked_fill_(target_C == ignore_index, 0.0)", "loss_C", "ignored rows have a loss"),
    Mutant(
        SHARD, "squares_C = (largest_C + total_C.log()).square()", "squares_C = total_C.log().square()", "no maximum"
    ),
    Mutant(SHARD, "squares_C.masked_fill_(target_C == ignore_index, 0.0)", "squares_C", "ignored rows have a z-loss"),
    Mutant(SHARD, "1.0 + 2.0 * z_loss * (largest_C", "1.0 + z_loss * (largest_C", "half the gradient of lse^2"),
    Mutant(SHARD, "total_C = total_C / (1.0 +", "total_C = total_C * (1.0 +", "less of the probabilities, not more"),
)

ROWS = (
    Mutant(EAGER, "local = target[:, None] - start", "local = target[:, None]", "classes not counted from the first"),
    Mutant(EAGER, "target[:, None] - start", "target[:, None] - start - 1", "the class before the target"),
    Mutant(
        EAGER, "z.gather(1, local).masked_fill_(~here, 0.0)", "z.gather(1, local)", "another rank's target is my first"
    ),
    Mutant(EAGER, 'largest.masked_fill(largest == float("-inf"), 0.0)', "largest", "infinity less infinity"),
    Mutant(EAGER, "            parts_4C[3, rows] = z.sum(1)\n", "            pass\n", "no distances"),
    Mutant(
        EAGER,
        "here * z.new_full((), smoothing - 1.0)",
        "z.new_full(here.shape, smoothing - 1.0)",
        "a target on each rank",
    ),
    Mutant(EAGER, "here * z.new_full((), smoothing - 1.0)", "here * z.new_full((), -1.0)", "target not smoothed"),
    Mutant(EAGER, "z.sub_(smoothing / vocab)", "z.sub_(smoothing)", "every class gets the whole share"),
    Mutant(EAGER, "z.mul_(weight_C[rows, None] * scale)", "z.mul_(weight_C[rows, None])", "the scale forgotten"),
    Mutant(
        EAGER,
        "            z.mul_(cap_slope)\n        z.masked",
        "            pass\n        z.masked",
        "the cap's slope forgotten",
    ),
    Mutant(EAGER, "            logits_CV[rows] = z\n", "            pass\n", "16-bit gradient not written back"),
    Mutant(
        EAGER,
        "z = logits_CV[rows].to(compute_dtype, copy=True)",
        "z = logits_CV[rows].to(compute_dtype)",
        "logits used up",
    ),
)

KERNEL = (
    Mutant(FUSED, "(target >= start) & (target < start + n_cols)", "(target >= start)", "every later class is mine"),
    Mutant(FUSED, "Z + (target - start), mask=here", "Z + target * 0, mask=here", "the first class's logit"),
    Mutant(FUSED, 'tl.where(row_max == float("-inf"), 0.0, total)', "total", "infinity less infinity"),
    Mutant(FUSED, "n_cols * (origin - row_max))", "origin - row_max)", "one distance shifted"),
    Mutant(FUSED, "            target - start,\n", "            target,\n", "the gradient at the first classes"),
    Mutant(
        FUSED,
        "            vocab,\n            row_max",
        "            n_cols,\n            row_max",
        "smoothed by my classes",
    ),
    Mutant(FUSED, "tl.load(WEIGHT + row) * scale", "tl.load(WEIGHT + row)", "the scale forgotten in the gradient"),
    Mutant(
        FUSED, "    inverse = 1.0 / tl.load(TOTAL + row)", "    inverse = 1.0 / tl.load(TOTAL)", "the first row's sum"
    ),
    Mutant(FUSED, "    row_max = tl.load(LARGEST + row)", "    row_max = tl.load(LARGEST)", "the first row's maximum"),
)

MUTANTS = (*TOGETHER, *ROWS, *KERNEL)
