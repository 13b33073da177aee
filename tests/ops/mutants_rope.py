"""Plausible mistakes in rope: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

FUSED = "rope/fused.py"
EAGER = "rope/eager.py"
HOST = "rope/__init__.py"

MUTANTS = (
    Mutant(FUSED, "y_1 = a * cos_1[None, :]", "y_1 = a * cos_2[None, :]", "one cos for both of a pair"),
    Mutant(FUSED, "y_1 = a * cos_1[None, :] + b * cross_1[None, :]", "y_1 = a * cos_1[None, :]", "no turn"),
    Mutant(FUSED, "+ a * cross_2[None, :]", "+ b * cross_2[None, :]", "turns b by itself"),
    Mutant(
        FUSED,
        "        cross_1 = sin_2\n        cross_2 = -sin_1\n",
        "        cross_1 = sin_1\n        cross_2 = -sin_2\n",
        "the two sines of a pair are not crossed backward",
    ),
    Mutant(
        FUSED,
        "        cross_1 = sin_2\n        cross_2 = -sin_1\n",
        "        cross_1 = -sin_1\n        cross_2 = sin_2\n",
        "backward turns forward",
    ),
    Mutant(
        FUSED,
        "        cross_1 = -sin_1\n        cross_2 = sin_2\n",
        "        cross_1 = sin_1\n        cross_2 = -sin_2\n",
        "turns the other way",
    ),
    Mutant(FUSED, "        sin_1 = -sin_1\n", "        sin_1 = sin_1\n", "inverse for one of a pair only"),
    Mutant(
        FUSED,
        "first, second = tl.split(tl.reshape(x, (HEADS, BLOCK, 2)))",
        "second, first = tl.split(tl.reshape(x, (HEADS, BLOCK, 2)))",
        "pairs taken in reverse",
    ),
    Mutant(
        FUSED,
        "tl.reshape(tl.join(first, second), (HEADS, 2 * BLOCK))",
        "tl.reshape(tl.join(second, first), (HEADS, 2 * BLOCK))",
        "pairs written in reverse",
    ),
    Mutant(
        FUSED,
        "first, second = tl.split(tl.reshape(table, (BLOCK, 2)))",
        "second, first = tl.split(tl.reshape(table, (BLOCK, 2)))",
        "tables taken in reverse",
    ),
    Mutant(FUSED, "T + (pair + HALF) * stride", "T + pair * stride", "the first half of cos serves both halves"),
    Mutant(
        FUSED, "        second = tl.load(at + HALF, mask", "        second = tl.load(at, mask", "the first half is both"
    ),
    Mutant(
        FUSED,
        "tl.load(at_x, mask=in_rest, other=0.0)",
        "tl.load(at_x, mask=in_rest & (rest < 0)[None, :], other=0.0)",
        "the rest is lost",
    ),
    Mutant(FUSED, "at_y = Y + 2 * HALF + (head", "at_y = Y + REST + (head", "the rest is written elsewhere"),
    Mutant(
        FUSED,
        "    head = (first_head + tl.arange(0, HEADS))",
        "    head = (0 * first_head + tl.arange(0, HEADS))",
        "every program serves the first heads",
    ),
    Mutant(FUSED, "b = zero + tl.program_id(0) // n_tokens", "b = zero + tl.program_id(0) * 0", "one batch row"),
    Mutant(FUSED, "COS + b * stride_cos_b", "COS + 0 * b * stride_cos_b", "one row of cos for the whole batch"),
    Mutant(
        FUSED,
        "SIN + b * stride_sin_b + s * stride_sin_s",
        "SIN + b * stride_sin_b + 0 * s * stride_sin_s",
        "one token's sin for all",
    ),
    Mutant(FUSED, "0 if table_BSR.shape[0] == 1 else batch", "batch", "a shared row of cos is stepped over"),
    Mutant(
        FUSED,
        "return x if x.stride(-1) == 1 else x.contiguous()",
        "return x.contiguous() if x.stride(-1) == 1 else x",
        "strides inside a head ignored",
    ),
    Mutant(
        FUSED,
        "IN_INTERLEAVED=sides[backward]",
        'IN_INTERLEAVED=layout != "half"',
        "the gradient comes in the input's layout",
    ),
    Mutant(
        FUSED,
        "OUT_INTERLEAVED=sides[not backward]",
        'OUT_INTERLEAVED=layout == "interleaved"',
        "the gradient leaves in the output's layout",
    ),
    Mutant(
        FUSED,
        'sides = (layout != "half", layout == "interleaved")',
        'sides = (layout == "interleaved", layout == "interleaved")',
        "not de-interleaved",
    ),
    Mutant(
        FUSED,
        "layout, per_pair, inverse, backward=True)",
        "layout, per_pair, inverse, backward=False)",
        "backward is forward",
    ),
    Mutant(
        EAGER,
        "y_1.copy_(a * cos_1 - b * sin_1)",
        "y_1.copy_(a * cos_1 + b * sin_1)",
        "turns one of a pair the other way",
    ),
    Mutant(
        EAGER,
        "y_2.copy_(b * cos_2 + a * sin_2)",
        "y_2.copy_(b * cos_1 + a * sin_1)",
        "the pair's tables are taken as equal",
    ),
    Mutant(
        EAGER,
        "dx_1.copy_(dy_1 * cos_1 + dy_2 * sin_2)",
        "dx_1.copy_(dy_1 * cos_1 + dy_2 * sin_1)",
        "the sines are not crossed backward",
    ),
    Mutant(
        EAGER,
        "dx_2.copy_(dy_2 * cos_2 - dy_1 * sin_1)",
        "dx_2.copy_(dy_2 * cos_2 + dy_1 * sin_1)",
        "backward turns forward",
    ),
    Mutant(
        EAGER,
        "y_BSHD[..., rotary_dim:].copy_(x_BSHD[..., rotary_dim:])",
        "y_BSHD[..., rotary_dim:].zero_()",
        "the rest is lost",
    ),
    Mutant(
        EAGER,
        "dx_BSHD[..., rotary_dim:].copy_(dy_BSHD[..., rotary_dim:])",
        "dx_BSHD[..., rotary_dim:].zero_()",
        "the rest has no gradient",
    ),
    Mutant(EAGER, "sin = -sin if inverse else sin", "sin = sin", "inverse forgotten"),
    Mutant(
        EAGER,
        'y_1, y_2 = _pairs(y_BSHD[..., :rotary_dim], layout == "interleaved")',
        'y_1, y_2 = _pairs(y_BSHD[..., :rotary_dim], layout != "half")',
        "stays interleaved",
    ),
    Mutant(
        EAGER,
        "wide = torch.promote_types(torch.promote_types(x.dtype, cos_BSR.dtype), torch.float32)",
        "wide = x.dtype",
        "computes in the dtype of the input",
    ),
    Mutant(EAGER, "(table.to(wide)[:, :, None] for table", "(table[:, :, None] for table", "rounds before the sum"),
    Mutant(
        HOST,
        "table[None] if table.dim() == 2 else table for table in (cos, sin)",
        "table[None] if table.dim() == 2 else table for table in (sin, cos)",
        "sin taken for cos",
    ),
    Mutant(
        HOST, "return q.dtype if keep_dtype else", "return q.dtype if not keep_dtype else", "the other output dtype"
    ),
    Mutant(
        HOST, "ctx.save_for_backward(cos, sin)", "ctx.save_for_backward(sin, cos)", "cos and sin exchanged in backward"
    ),
    Mutant(
        HOST,
        "ctx.per_pair, ctx.inverse, ctx.implementation)",
        "ctx.per_pair, False, ctx.implementation)",
        "the gradient of the inverse turns the same way",
    ),
)
