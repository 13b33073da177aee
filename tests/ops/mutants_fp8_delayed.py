"""Plausible mistakes in delayed scaling; none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

KERNEL = "fp8_linear/delayed_fused.py"
HISTORY = "fp8_linear/history.py"
NODE = "fp8_linear/__init__.py"
TORCH = "fp8_linear/delayed.py"

MUTANTS = (
    Mutant(TORCH, "over = finite & (", "over = (", "infinities saturate by torch"),
    Mutant(TORCH, ".abs() > torch.finfo", ".abs() >= torch.finfo", "what just fits saturates by torch"),
    Mutant(
        TORCH, 'joined.masked_fill(~finite, float("nan"))', "joined", "an infinity becomes the largest value by torch"
    ),
    Mutant(TORCH, "        history.settle()\n        scale", "        scale", "the scale of the call before the last"),
    Mutant(
        TORCH, "torch.stack(ends).abs().amax()", "torch.stack(ends).amax()", "negative values are never the largest"
    ),
    Mutant(
        KERNEL,
        "mask=partials < n_last, other=0), 0)\n        ring",
        "mask=partials < 1, other=0), 0)\n        ring",
        "the first program's largest value alone",
    ),
    Mutant(KERNEL, "(ring == slot) & (last < INFINITE)", "(ring == slot) & (last >= 0)", "a NaN in the history"),
    Mutant(KERNEL, "(ring == slot) & (last < INFINITE)", "(ring < 0)", "the last call is left out"),
    Mutant(KERNEL, "tl.where(largest == 0, 1.0, scale * HEADROOM)", "scale * HEADROOM", "the least scale after zeros"),
    Mutant(KERNEL, "1.0, scale * HEADROOM", "1.0, scale", "no headroom"),
    Mutant(KERNEL, "tl.load(TOTAL) + ", "", "the count of the last call alone"),
    Mutant(KERNEL, "folds=first_col == 0", "folds=True", "the count of each tensor's launch"),
    Mutant(KERNEL, "tl.store(AMAXES + ring, amaxes, mask=ring == slot)", "pass", "nothing is kept in the ring"),
    Mutant(KERNEL, "mask=ring == slot)", "mask=ring == slot + 1)", "kept a place too far"),
    Mutant(KERNEL, "(254 - (bits >> BITS))", "(253 - (bits >> BITS))", "half the inverse"),
    Mutant(
        KERNEL,
        "amax = tl.maximum(amax, tl.max(magnitude(x), 1))",
        "amax = tl.max(magnitude(x), 1)",
        "a program's last tile alone",
    ),
    Mutant(KERNEL, "over += tl.sum", "over = tl.sum", "what saturates in a program's last tile"),
    Mutant(KERNEL, "finite & (tl.abs(scaled) > MOST)", "tl.abs(scaled) > MOST", "infinities saturate"),
    Mutant(KERNEL, "tl.abs(scaled) > MOST", "tl.abs(scaled) >= MOST", "what just fits saturates"),
    Mutant(KERNEL, "(tl.abs(scaled) > MOST)", "(scaled > MOST)", "negative values never saturate"),
    Mutant(KERNEL, 'tl.where(finite, scaled, float("nan"))', "scaled", "an infinity becomes the largest value"),
    Mutant(
        KERNEL,
        "record[:, first_program : first_program + count]",
        "record[:, :count]",
        "tensors write over one another's parts",
    ),
    Mutant(HISTORY, "(self.calls - 1) % LENGTH", "(self.calls - 1) % 2", "a history of two calls"),
    Mutant(HISTORY, "LENGTH = 16", "LENGTH = 8", "half the history"),
    Mutant(HISTORY, "is_here & amax.isfinite()", "is_here", "a NaN in the history of torch"),
    Mutant(HISTORY, "self.total + self.saturated_P.sum()", "self.saturated_P.sum()", "the total forgets"),
    Mutant(HISTORY, "* 2.0**MARGIN", "* 1.0", "no headroom by torch"),
    Mutant(
        HISTORY, "torch.where(amax == 0, 1.0, ", "torch.where(amax < 0, 1.0, ", "the least scale after zeros by torch"
    ),
    Mutant(NODE, "history=delayed.histories.x", "history=delayed.histories.gradients", "one history for both"),
    Mutant(
        NODE,
        "functools.partial(cast_x, scale=of_x.scale)",
        "functools.partial(cast_x)",
        "computed again by another scale",
    ),
)
