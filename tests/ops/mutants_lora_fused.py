"""Plausible mistakes in the Triton kernels of low-rank adapters and in the columns that they use; none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

KERNELS = "lora/products_fused.py"
LAUNCHES = "lora/fused.py"
PRODUCTS = "linear/fused.py"

VALUES = (
    Mutant(KERNELS, "store_one(P, p1 * factor1", "store_one(P, p1 * factor0 * 2", "another adapter's factor forward"),
    Mutant(KERNELS, "store_grad_a(DA1, da1 * factor1", "store_grad_a(DA1, da1", "dA unscaled"),
    Mutant(
        KERNELS,
        "stride_dp, n_rows, n_cols, R, PRECISION) * factor0",
        "stride_dp, n_rows, n_cols, R, PRECISION)",
        "dx unscaled",
    ),
    Mutant(KERNELS, "        part0 += part1\n", "        part0 = part1\n", "dx of the second adapter alone"),
    Mutant(
        KERNELS, "tl.load(dx, mask=mask, other=0.0).to(tl.float32) + part0", "part0", "dx of the linears is overwritten"
    ),
    Mutant(
        KERNELS,
        "store_one(X, p0 * factor0, rows, n_cols + start0",
        "store_one(X, p0, rows, n_cols + start0",
        "p beside x unscaled",
    ),
    Mutant(KERNELS, "(n_cols + start + r)[None, :]", "(n_cols + r)[None, :]", "every B in the first columns"),
    Mutant(
        KERNELS,
        "mask = (rows < n_rows)[:, None] & (r < padded)[None, :]",
        "mask = (rows < n_rows)[:, None] & (r < padded - 1)[None, :]",
        "a column less of p",
    ),
    Mutant(
        KERNELS,
        "rows = block * ROWS + tl.arange(0, ROWS)\n    r = ",
        "rows = tl.arange(0, ROWS)\n    r = ",
        "only the first rows of B",
    ),
    Mutant(
        LAUNCHES,
        "sorted({one.lot // TOGETHER for one in group})",
        "sorted({one.lot // TOGETHER for one in group})[:1]",
        "a fourth adapter is left out",
    ),
    Mutant(
        PRODUCTS, "both[:, :n_cols], both[:, n_cols:]", "both[:, :n_cols], both[:, :n_cols]", "dx in the place of dp"
    ),
    Mutant(PRODUCTS, "        started = True\n", "", "each linear overwrites dx"),
)
"""Caught by values and gradients of adapters with columns beside their weights."""

MASKS = (
    Mutant(
        KERNELS,
        "x1 = masked(x, word1, dropout1)\n                x2",
        "x1 = masked(x, word0, dropout1)\n                x2",
        "one mask for two adapters forward",
    ),
    Mutant(
        KERNELS,
        "x1 = masked(x, word1, dropout1)\n            x2",
        "x1 = x\n            x2",
        "nothing is dropped in dA",
    ),
    Mutant(
        KERNELS,
        "part0 = masked(part0, word0, dropout0)",
        "part0 = masked(part0, word1, dropout0)",
        "another mask in dx",
    ),
    Mutant(KERNELS, ">= dropout).to(x.dtype)", "< dropout).to(x.dtype)", "what should be kept is dropped"),
    Mutant(KERNELS, "zero + FIRST, zero, ROUNDS", "zero, zero, ROUNDS", "one mask for adapters of two launches"),
)
"""Caught by the masks: how they agree forward and backward, and differ between adapters."""
