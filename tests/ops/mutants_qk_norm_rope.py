"""Plausible mistakes in qk_norm_rope: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

HEADS = "qk_norm_rope/heads.py"
FUSED = "qk_norm_rope/fused.py"
EAGER = "qk_norm_rope/eager.py"
HOST = "qk_norm_rope/__init__.py"

FORWARD = (
    Mutant(HEADS, "tl.sum(a * a + b * b, 1)", "tl.sum(a * a, 1)", "half a head in the mean"),
    Mutant(HEADS, "        squares += tl.sum(x_rest * x_rest, 1)\n", "", "the rest not in the mean"),
    Mutant(HEADS, "squares / (2 * HALF + REST) + eps", "squares / (2 * HALF) + eps", "a mean over the rotated part"),
    Mutant(HEADS, "(2 * HALF + REST) + eps)", "(2 * HALF + REST))", "eps forgotten"),
    Mutant(
        HEADS,
        "a = a * rstd[:, None] * (w_1 + offset)[None, :]",
        "a = a * rstd[:, None] * w_1[None, :]",
        "offset forgotten",
    ),
    Mutant(
        HEADS,
        "b = b * rstd[:, None] * (w_2 + offset)",
        "b = b * rstd[:, None] * (w_1 + offset)",
        "one weight for both of a pair",
    ),
    Mutant(HEADS, "y_1 = a * cos_1[None, :] - b", "y_1 = a * cos_1[None, :] + b", "turned the other way"),
    Mutant(HEADS, "+ a * sin_2[None, :]", "+ a * sin_1[None, :]", "one sine for both of a pair"),
    Mutant(HEADS, "x_rest * rstd[:, None] * w_rest[None, :]", "x_rest * w_rest[None, :]", "the rest not normalised"),
    Mutant(
        HEADS,
        "in_rest = mask[:, None] & (rest < REST)[None, :]\n        at_x = X + 2 * HALF +",
        "in_rest = mask[:, None] & (rest < REST)[None, :]\n        at_x = X +",
        "the rest read from the front",
    ),
)
BACKWARD = (
    Mutant(
        HEADS,
        "g_1 = cos_1[None, :] * dy_1 + sin_2[None, :] * dy_2",
        "g_1 = cos_1[None, :] * dy_1 + sin_1[None, :] * dy_2",
        "the two sines of a pair are not crossed",
    ),
    Mutant(HEADS, "dy_2 - sin_1[None, :] * dy_1", "dy_2 + sin_1[None, :] * dy_1", "backward turns forward"),
    Mutant(
        HEADS,
        "dw_1 += tl.sum(g_1 * x_1, 0)",
        "dw_1 = tl.sum(g_1 * x_1, 0)",
        "only the last tile in a weight's gradient",
    ),
    Mutant(
        HEADS, "dw_2 += tl.sum(g_2 * x_2, 0)", "dw_2 += tl.sum(dy_2 * x_2, 0)", "a weight's gradient not turned back"
    ),
    Mutant(HEADS, "g_1 *= (w_1 + offset)[None, :]", "g_1 *= w_1[None, :]", "offset forgotten in the gradient"),
    Mutant(HEADS, "tl.sum(g_1 * x_1 + g_2 * x_2, 1)", "tl.sum(g_1 * x_1, 1)", "half a head in the projection"),
    Mutant(HEADS, "            along_x += tl.sum(g_rest * x_rest, 1)\n", "", "the rest not in the projection"),
    Mutant(HEADS, "(along_x / size)", "(along_x / (2 * HALF))", "a mean over the rotated part in the gradient"),
    Mutant(HEADS, "dx_2 = (g_2 - x_2 * along_x) * rstd", "dx_2 = g_2 - x_2 * along_x", "rstd forgotten"),
    Mutant(HEADS, "            g_rest *= w_rest[None, :]\n", "", "the rest's weight forgotten"),
    Mutant(
        HEADS,
        "tl.store(DW_PARTIAL + 2 * pair, dw_1",
        "tl.store(DW_PARTIAL + 2 * pair, dw_2",
        "interleaved weights' gradients mixed up",
    ),
    Mutant(
        HEADS,
        "tl.store(DW_PARTIAL + HALF + pair, dw_2",
        "tl.store(DW_PARTIAL + HALF + pair, dw_1",
        "one gradient for both halves",
    ),
    Mutant(
        HEADS,
        "in_dx = (token * n_heads + head) * size",
        "in_dx = (s * n_heads + head) * size",
        "every batch written to the first",
    ),
    Mutant(HEADS, "(tile % GROUPS) * HEADS", "(tile % GROUPS) * 0", "the first heads of a token again and again"),
)
LAUNCH = (
    Mutant(FUSED, "part * Q_HEADS,", "0 * Q_HEADS,", "only the first heads of a token"),
    Mutant(FUSED, "K_RSTD + token * n_k_heads", "K_RSTD + token * n_q_heads", "k's rstd in q's places"),
    Mutant(FUSED, "        sin_1 = -sin_1\n", "        sin_1 = sin_1\n", "inverse for one of a pair only"),
    Mutant(
        FUSED,
        "*(weight.contiguous() for weight in weights),\n        *rstds,\n        cos_BSR",
        "*(weights[0].contiguous() for weight in weights),\n        *rstds,\n        cos_BSR",
        "q's weight for both",
    ),
    Mutant(FUSED, "sum_partials(partial,", "sum_partials(partial[:1],", "the first program's share only"),
)
OTHERS = (
    Mutant(EAGER, "eps, offset, WIDE, rstd_BSH.dtype", "eps, 0.0, WIDE, rstd_BSH.dtype", "offset forgotten"),
    Mutant(
        EAGER,
        "weight, rstd.flatten(), offset, WIDE",
        "weight, rstd.flatten(), 0.0, WIDE",
        "offset forgotten in the gradient",
    ),
    Mutant(
        EAGER,
        "[turned_back], cos_BSR, sin_BSR, layout, per_pair, inverse",
        "[turned_back], cos_BSR, sin_BSR, layout, per_pair, not inverse",
        "backward turns forward",
    ),
    Mutant(
        EAGER,
        "[y_BSHD], cos_BSR, sin_BSR, layout, per_pair, inverse",
        "[y_BSHD], cos_BSR, sin_BSR, layout, per_pair, False",
        "inverse forgotten",
    ),
    Mutant(
        HOST, 'if order == "cast_then_mul" else q.dtype', 'if order == "" else q.dtype', "a wider weight does not widen"
    ),
    Mutant(
        HOST,
        "return normed if keep_dtype else",
        "return q.dtype if keep_dtype else",
        "keep_dtype keeps q's, not the norm's",
    ),
    Mutant(HOST, "else torch.promote_types(normed, cos.dtype)", "else normed", "wider tables do not widen"),
    Mutant(
        HOST,
        "return grads[0], grads[1], grad_weights[0], grad_weights[1]",
        "return grads[0], grads[1], grad_weights[0], grad_weights[0]",
        "q's weight's gradient for both",
    ),
)

MUTANTS = (*FORWARD, *BACKWARD, *LAUNCH, *OTHERS)
