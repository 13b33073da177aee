"""Plausible mistakes in rms_norm: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

FUSED = "rms_norm/fused.py"
EAGER = "rms_norm/eager.py"
HOST = "rms_norm/__init__.py"

FORWARD = (
    Mutant(FUSED, "tl.sum(x * x, 0) / n_cols + eps", "tl.sum(x * x, 0) / n_cols", "eps forgotten"),
    Mutant(FUSED, "tl.sum(x * x, 0) / n_cols + eps", "tl.sum(x * x, 0) / BLOCK + eps", "mean over the padded row"),
    Mutant(
        FUSED,
        "tl.rsqrt(tl.sum(x * x, 0) / n_cols + eps)",
        "tl.rsqrt(tl.sum(x * x, 0) / n_cols) + eps",
        "eps after the root",
    ),
    Mutant(
        FUSED,
        "x = tl.load(X + start * stride_x + cols, mask=in_row, other=0.0).to(tl.float32)\n        rstd",
        "x = tl.load(X + start * stride_x + cols, mask=in_row, other=1.0).to(tl.float32)\n        rstd",
        "padding of the row counts as ones",
    ),
    Mutant(
        FUSED,
        "(w.to(tl.float32) + offset).to(W.dtype.element_ty)",
        "w.to(W.dtype.element_ty)",
        "offset forgotten, cast first",
    ),
    Mutant(
        FUSED,
        "            w = w.to(tl.float32) + offset\n",
        "            w = w.to(tl.float32)\n",
        "offset forgotten, cast last",
    ),
    Mutant(
        FUSED,
        "            if CAST_THEN_MUL:\n                y = y.to(X",
        "            if not CAST_THEN_MUL:\n                y = y.to(X",
        "rounds in the other order",
    ),
    Mutant(FUSED, "y = y.to(X.dtype.element_ty).to(tl.float32)", "y = y.to(tl.float32)", "rounds once only"),
    Mutant(FUSED, "            y = y * w\n", "            y = y + w\n", "weight added"),
    Mutant(FUSED, "y.to(Y.dtype.element_ty)", "y.to(X.dtype.element_ty)", "output rounded to the input's dtype"),
    Mutant(FUSED, "tl.store(RSTD + row, rstd)", "tl.store(RSTD + row, rstd * rstd)", "saves the wrong statistic"),
    Mutant(
        FUSED,
        "X + start * stride_x + cols, mask=in_row, other=0.0).to(tl.float32)\n        rstd",
        "X + start * n_cols + cols, mask=in_row, other=0.0).to(tl.float32)\n        rstd",
        "strides of the input ignored",
    ),
    Mutant(
        FUSED,
        "        None if weight_H is None else weight_H.contiguous(),\n        y_NH",
        "        weight_H,\n        y_NH",
        "stride of the weight ignored",
    ),
    Mutant(
        FUSED,
        '        HAS_WEIGHT=weight_H is not None,\n        CAST_THEN_MUL=order == "cast_then_mul",',
        '        HAS_WEIGHT=weight_H is not None,\n        CAST_THEN_MUL=order != "cast_then_mul",',
        "order misread",
    ),
)

BACKWARD = (
    Mutant(FUSED, "other=0.0).to(tl.float32) + offset\n", "other=0.0).to(tl.float32)\n", "offset forgotten"),
    Mutant(FUSED, "tl.sum(dy * normed, 0) / n_cols", "tl.sum(dy * normed, 0) / BLOCK", "mean over the padded row"),
    Mutant(
        FUSED, "tl.sum(dy * normed, 0) / n_cols", "tl.sum(dy * x, 0) / n_cols", "projects on x instead of x normalised"
    ),
    Mutant(FUSED, "(dy - normed * along_normed) * rstd", "dy * rstd", "projection forgotten"),
    Mutant(
        FUSED, "(dy - normed * along_normed) * rstd", "(dy + normed * along_normed) * rstd", "sign of the projection"
    ),
    Mutant(FUSED, "(dy - normed * along_normed) * rstd", "dy - normed * along_normed", "rstd forgotten"),
    Mutant(FUSED, "            dy = dy * w\n", "            dy = dy + 0 * w\n", "weight forgotten"),
    Mutant(
        FUSED, "                dw += dy * normed\n", "                dw += dy * x\n", "dweight of x not normalised"
    ),
    Mutant(
        FUSED,
        "                dw += dy * normed\n",
        "                dw = dy * normed\n",
        "dweight of the last row only",
    ),
    Mutant(FUSED, "dw += dy * normed.to(", "dw = dy * normed.to(", "dweight of the last row only, cast first"),
    Mutant(
        FUSED,
        "rstd = tl.load(RSTD + row)",
        "rstd = tl.load(RSTD + tl.program_id(0))",
        "rstd of the program's first row",
    ),
    Mutant(FUSED, "start * stride_dy", "start * stride_x", "strides of the incoming gradient ignored"),
    Mutant(
        FUSED,
        "        grad_output_NH.stride(0),\n",
        "        grad_output_NH.shape[1],\n",
        "takes the gradient for contiguous",
    ),
    Mutant(
        FUSED,
        "return grad_x_NH, sum_partials(partial_PH, weight_H.dtype)",
        "return grad_x_NH, sum_partials(partial_PH[:1], weight_H.dtype)",
        "dweight of one program only",
    ),
    Mutant(FUSED, "tl.sum(total, 0).to(SUM", "(tl.sum(total, 0) / n_partials).to(SUM", "dweight averaged"),
    Mutant(FUSED, "mask=mask, other=0.0)", "mask=mask, other=1.0)", "programs that do not exist count as ones"),
    Mutant(FUSED, "(partial < n_partials)[:, None] &", "(partial < 1)[:, None] &", "sums the first program only"),
    Mutant(FUSED, "total += tl.load(PARTIAL", "total = tl.load(PARTIAL", "sums the last tile of programs only"),
    Mutant(
        FUSED,
        "sum_H = torch.empty(partial_PH.shape[1], dtype=dtype",
        "sum_H = torch.empty(partial_PH.shape[1], dtype=torch.bfloat16",
        "dweight rounded to bfloat16",
    ),
    Mutant(FUSED, "torch.zeros_like(weight_H)", "torch.empty_like(weight_H)", "dweight of no row is not set"),
    Mutant(
        FUSED,
        "dw = tl.zeros((BLOCK,), dtype=tl.float32)",
        "dw = tl.full((BLOCK,), 1.0, dtype=tl.float32)",
        "dweight starts at one",
    ),
)

IN_TORCH = (
    Mutant(EAGER, "x_wide.pow(2).mean(-1) + eps", "x_wide.pow(2).mean(-1)", "eps forgotten"),
    Mutant(
        EAGER,
        "normed = x_wide * rstd_N[:, None]",
        "normed = x_wide.mul_(rstd_N[:, None])",
        "overwrites the input in float32",
    ),
    Mutant(
        EAGER,
        "grad_wide = grad_wide * (weight",
        "grad_wide = grad_wide.mul_(weight",
        "overwrites the incoming gradient in float32",
    ),
    Mutant(
        EAGER,
        "normed.mul_(weight_H.to(compute_dtype) + offset)",
        "normed.mul_(weight_H.to(compute_dtype))",
        "offset forgotten",
    ),
    Mutant(EAGER, "grad_wide * factor", "grad_wide", "dweight without x"),
    Mutant(EAGER, ".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)", "sum for mean"),
)

IN_HOST_CODE = (
    Mutant(
        HOST, "ctx.needs_input_grad[1]", "ctx.needs_input_grad[0]", "asks whether x, not the weight, needs a gradient"
    ),
    Mutant(
        HOST,
        "rows(grad_output), rows(x), weight",
        "rows(grad_output), rows(grad_output), weight",
        "gradient taken for x",
    ),
    Mutant(
        HOST,
        "_call(x, weight, eps, offset, order, implementation)",
        "_call(x, weight, eps, 0.0, order, implementation)",
        "offset lost",
    ),
)

MUTANTS = (*FORWARD, *BACKWARD, *IN_TORCH, *IN_HOST_CODE)
