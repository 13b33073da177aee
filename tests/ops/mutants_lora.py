"""Plausible mistakes in low-rank adapters: each changes what is computed, drawn or kept, none crashes."""

from tests.ops.mutation import Mutant

EAGER = "lora/eager.py"
HOST = "linear/__init__.py"

VALUES = (
    Mutant(EAGER, "beta=0 if bias is None else 1", "beta=0", "the bias is forgotten"),
    Mutant(EAGER, "plain_NR @ _stacked(a, grads.plain)", "plain_NR @ _stacked(a, grads.plain).abs()", "gradient of x"),
    Mutant(EAGER, "for part in rest:", "for part in rest[:0]:", "only one adapter reaches x"),
    Mutant(EAGER, "grads.plain_NR.t() @ x_NH", "grads.plain_NR.t() @ x_NH.abs()", "gradient of A"),
    Mutant(
        EAGER, "grad_output_NF.t(), p_NR, beta=0, alpha=form.factor", "grad_output_NF.t(), p_NR, beta=0", "B unscaled"
    ),
    Mutant(HOST, "start = low_rank.grad_input(", "start = None and low_rank.grad_input(", "x without the adapters"),
)
"""Caught by values and gradients."""

MASKS = (
    Mutant(EAGER, "draw_mask(x_NH, form.dropout).mul_(x_NH)", "x_NH", "nothing is dropped forward"),
    Mutant(EAGER, "form.dropout).mul_(x)", "form.dropout / 2).mul_(x)", "another probability in backward"),
    Mutant(
        EAGER, "states[i] = generator_state", "states[0] = states[i] = generator_state", "one mask for all in backward"
    ),
    Mutant(
        EAGER,
        "    with generator_at(state, x.device):\n        return",
        "    if True:\n        return",
        "a new mask in backward",
    ),
)
"""Caught by how often, how independently and how repeatably elements are dropped."""

KEPT = (Mutant(HOST, "*a, *b, *p, *kept)", "*a, *b, *p, *kept, x * 1)", "a copy of the input is kept"),)
"""Caught by what is saved."""
