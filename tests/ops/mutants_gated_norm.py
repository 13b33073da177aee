"""Plausible mistakes in gated_rms_norm: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

FUSED = "gated_norm/fused.py"
EAGER = "gated_norm/eager.py"
HOST = "gated_norm/__init__.py"

FORWARD = (
    Mutant(FUSED, "tl.sum(x * x, 0) / n_cols + eps", "tl.sum(x * x, 0) / n_cols", "eps forgotten"),
    Mutant(FUSED, "tl.sum(x * x, 0) / n_cols + eps", "tl.sum(x * x, 0) / BLOCK + eps", "mean over the padded row"),
    Mutant(
        FUSED,
        "        if SILU:\n            activated = gate * activated\n",
        "        if not SILU:\n            activated = gate * activated\n",
        "activations confused",
    ),
    Mutant(FUSED, "            x = x * activated\n", "            x = x * gate\n", "gate not activated"),
    Mutant(FUSED, "            y = y * activated\n", "            y = y * gate\n", "last gate not activated"),
    Mutant(
        FUSED,
        "        if CAST_THEN_MUL:\n            y = y.to(X",
        "        if not CAST_THEN_MUL:\n            y = y.to(X",
        "rounds in the other order",
    ),
    Mutant(
        FUSED,
        "            if ROUND_PRODUCT:\n                y = y.to(X.dtype.element_ty).to(tl.float32)\n",
        "",
        "product with the weight not rounded",
    ),
    Mutant(FUSED, "y.to(Y.dtype.element_ty)", "y.to(X.dtype.element_ty)", "output rounded to the input's dtype"),
    Mutant(
        FUSED,
        "GATE + start * stride_gate + cols, mask=in_row, other=0.0).to(tl.float32)\n        activated = tl.sigmoid(gate)\n        if SILU:\n            activated",
        "GATE + start * stride_x + cols, mask=in_row, other=0.0).to(tl.float32)\n        activated = tl.sigmoid(gate)\n        if SILU:\n            activated",
        "strides of the gate ignored",
    ),
    Mutant(
        FUSED,
        "promote_types(x_NH.dtype, weight_H.dtype) == x_NH.dtype",
        "promote_types(x_NH.dtype, weight_H.dtype) != x_NH.dtype",
        "rounds the product where the weight is wider",
    ),
)

BACKWARD = (
    Mutant(FUSED, "sigmoid * (1.0 - sigmoid)", "sigmoid * (1.0 + sigmoid)", "slope of the sigmoid"),
    Mutant(FUSED, "slope = sigmoid + gate * slope", "slope = sigmoid + slope", "slope of silu"),
    Mutant(
        FUSED,
        "normed = x * activated * rstd\n        else",
        "normed = x * rstd\n        else",
        "normalises without the first gate",
    ),
    Mutant(
        FUSED,
        "normed = x * activated * rstd\n        dx",
        "normed = x * rstd\n        dx",
        "normalises without the first gate, after the sum",
    ),
    Mutant(FUSED, "tl.exp2(gate * -1.44", "tl.exp2(gate * 1.44", "sign of the first gate, after the sum"),
    Mutant(
        FUSED, "dgate = dy * product * _slope", "dgate = dy * factor * _slope", "gate's gradient without the weight"
    ),
    Mutant(
        FUSED,
        "            dy = dy * activated\n",
        "            dy = dy * gate\n",
        "gradient through the gate not activated",
    ),
    Mutant(FUSED, "dw += dy * factor", "dw = dy * factor", "dweight of the last row only"),
    Mutant(FUSED, "dw += dy * factor", "dw += dy * x", "dweight of x not normalised"),
    Mutant(FUSED, "dy = dy * w.to(", "dy = dy + 0 * w.to(", "weight forgotten"),
    Mutant(FUSED, "tl.sum(dy * normed, 0) / n_cols", "tl.sum(dy * normed, 0) / BLOCK", "mean over the padded row"),
    Mutant(FUSED, "(dy - normed * along_normed) * rstd", "dy * rstd", "projection forgotten"),
    Mutant(FUSED, "dgate = dx * x * _slope", "dgate = dx * normed * _slope", "first gate's gradient of x normalised"),
    Mutant(FUSED, "            dx = dx * activated\n", "", "first gate forgotten in dx"),
    Mutant(FUSED, "start * stride_dy", "start * stride_x", "strides of the incoming gradient ignored"),
    Mutant(FUSED, "sum_partials(dw_PH, ", "sum_partials(dw_PH[:1], ", "dweight of one program only"),
)

IN_TORCH = (
    Mutant(EAGER, "x_wide.pow(2).mean(-1) + eps", "x_wide.pow(2).mean(-1)", "eps forgotten"),
    Mutant(EAGER, "x_wide = x_wide * activated", "x_wide = x_wide.mul_(activated)", "overwrites the input in float32"),
    Mutant(
        EAGER, "grad = grad * activated", "grad = grad.mul_(activated)", "overwrites the incoming gradient in float32"
    ),
    Mutant(
        EAGER,
        "grad_gate = grad_x * x_wide * slope",
        "grad_gate = grad * x_wide * slope",
        "gate's gradient before the norm's",
    ),
    Mutant(EAGER, "1 + gate * (1 - sigmoid)", "1 + gate * sigmoid", "slope of silu"),
)

IN_HOST_CODE = (
    Mutant(
        HOST,
        "eps, activation, gate_first, order, implementation)[0]",
        "eps, activation, False, order, implementation)[0]",
        "gate always last",
    ),
    Mutant(
        HOST,
        "rows(grad_output), rows(x), rows(gate), weight",
        "rows(grad_output), rows(gate), rows(x), weight",
        "gate and x exchanged",
    ),
)

MUTANTS = (*FORWARD, *BACKWARD, *IN_TORCH, *IN_HOST_CODE)
