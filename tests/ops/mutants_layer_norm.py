"""Plausible mistakes in layer_norm: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

FUSED = "layer_norm/fused.py"
EAGER = "layer_norm/eager.py"
HOST = "layer_norm/__init__.py"

FORWARD = (
    Mutant(
        FUSED, "tl.sum(centred * centred, 0) / n_cols + eps", "tl.sum(centred * centred, 0) / n_cols", "eps forgotten"
    ),
    Mutant(
        FUSED,
        "tl.sum(centred * centred, 0) / n_cols",
        "tl.sum(centred * centred, 0) / BLOCK",
        "variance over the padded row",
    ),
    Mutant(
        FUSED,
        "tl.sum(centred * centred, 0) / n_cols",
        "tl.sum(centred * centred, 0) / (n_cols - 1)",
        "unbiased variance",
    ),
    Mutant(FUSED, "tl.sum(centred * centred, 0)", "tl.sum(h * h, 0)", "mean square for variance"),
    Mutant(FUSED, "centred = tl.where(in_row, h - mean, 0.0)", "centred = h - mean", "padding counts in the variance"),
    Mutant(
        FUSED,
        "        mean += tl.sum(tl.where(in_row, h - mean, 0.0), 0) / n_cols  # to the last bit: equal elements have no variance\n",
        "",
        "equal elements have a variance",
    ),
    Mutant(FUSED, "y = centred * rstd", "y = h * rstd", "mean not subtracted"),
    Mutant(FUSED, "            y = y * w\n", "            y = y + w\n", "weight added"),
    Mutant(FUSED, "            y = y + b\n", "            y = y * b\n", "bias multiplied"),
    Mutant(
        FUSED,
        "            h = rounded.to(tl.float32)\n",
        "            h = h + 0.0\n",
        "norm of the sum before it is rounded",
    ),
    Mutant(
        FUSED,
        "h = (h * scale).to(X.dtype.element_ty).to(tl.float32)",
        "h = h * scale",
        "scaled branch not rounded",
    ),
    Mutant(FUSED, "            if HAS_SCALE:\n", "            if not HAS_SCALE:\n", "scale forgotten"),
    Mutant(FUSED, "tl.store(MEAN + row, mean)", "tl.store(MEAN + row, mean * 0)", "mean not saved"),
    Mutant(FUSED, "tl.store(RSTD + row, rstd)", "tl.store(RSTD + row, rstd * rstd)", "saves the wrong statistic"),
    Mutant(FUSED, "X + start * stride_x + cols", "X + start * n_cols + cols", "strides of the input ignored"),
    Mutant(FUSED, "start * stride_residual", "start * stride_x", "strides of the residual ignored"),
    Mutant(
        FUSED,
        "        None if bias_H is None else bias_H.contiguous(),\n",
        "        bias_H,\n",
        "stride of the bias ignored",
    ),
    Mutant(
        FUSED,
        "else torch.promote_types(x_NH.dtype, residual_NH.dtype)",
        "else residual_NH.dtype",
        "sum in the residual's dtype",
    ),
)

BACKWARD = (
    Mutant(FUSED, "normed = (h - tl.load(MEAN + row)) * rstd", "normed = h * rstd", "mean not subtracted"),
    Mutant(
        FUSED,
        "tl.where(in_row, dy - tl.sum(dy, 0) / n_cols, 0.0)",
        "tl.where(in_row, dy, 0.0)",
        "mean's gradient forgotten",
    ),
    Mutant(
        FUSED, "tl.where(in_row, dy - tl.sum(dy, 0) / n_cols, 0.0)", "dy - tl.sum(dy, 0) / n_cols", "padding counts"
    ),
    Mutant(FUSED, "(dy - normed * along_normed) * rstd", "dy * rstd", "variance's gradient forgotten"),
    Mutant(FUSED, "(dy - normed * along_normed) * rstd", "dy - normed * along_normed", "rstd forgotten"),
    Mutant(FUSED, "dy = dy * w.to(", "dy = dy + 0 * w.to(", "weight forgotten"),
    Mutant(FUSED, "            dw += dy * normed\n", "            dw += dy * h\n", "dweight of x not normalised"),
    Mutant(FUSED, "            dw += dy * normed\n", "            dw = dy * normed\n", "dweight of the last row only"),
    Mutant(FUSED, "            db += dy\n", "            db = dy\n", "dbias of the last row only"),
    Mutant(FUSED, "            db += dy\n", "            db += dy * rstd\n", "dbias of the gradient scaled"),
    Mutant(FUSED, "            dx += tl.load(DH", "            dx = tl.load(DH", "only the sum's own gradient"),
    Mutant(FUSED, "HAS_DH=grad_h_NH is not None", "HAS_DH=False", "the sum's own gradient forgotten"),
    Mutant(FUSED, "start * stride_dy", "start * stride_h", "strides of the incoming gradient ignored"),
    Mutant(FUSED, "start * stride_dh", "start * stride_h", "strides of the sum's gradient ignored"),
    Mutant(FUSED, "sum_partials(dw_PH, ", "sum_partials(dw_PH[:1], ", "dweight of one program only"),
    Mutant(FUSED, "sum_partials(db_PH, ", "sum_partials(db_PH[1:], ", "dbias without the first program"),
)

IN_TORCH = (
    Mutant(EAGER, "normed.pow(2).mean(-1) + eps", "normed.pow(2).mean(-1)", "eps forgotten"),
    Mutant(EAGER, "x_NH if scale == 1.0 else x_NH * scale", "x_NH", "scale forgotten"),
    Mutant(
        EAGER, "grad = grad * (weight_H", "grad = grad.mul_(weight_H", "overwrites the incoming gradient in float32"
    ),
    Mutant(EAGER, "    grad = grad - grad.mean(-1, keepdim=True)\n", "", "mean's gradient forgotten"),
    Mutant(
        EAGER, "        grad_sum.add_(grad_h_NH)\n", "        grad_sum = grad_h_NH\n", "only the sum's own gradient"
    ),
)

IN_HOST_CODE = (
    Mutant(HOST, "rows(x), rows(residual), weight", "rows(residual), rows(x), weight", "scales the residual"),
    Mutant(
        HOST,
        "_to(grad_sum, ctx.dtypes[1]) if",
        "_scaled(_to(grad_sum, ctx.dtypes[1]), ctx.scale) if",
        "gradient of the residual scaled",
    ),
    Mutant(HOST, "return grad if scale == 1.0 else grad * scale", "return grad", "gradient of x not scaled"),
    Mutant(
        HOST,
        "_call(x, weight, bias, eps, offset, implementation)",
        "_call(x, weight, bias, eps, 0.0, implementation)",
        "offset lost",
    ),
    Mutant(
        HOST,
        "        rows(grad_y),\n        None if grad_h is None else rows(grad_h),\n",
        "        rows(grad_y),\n        None,\n",
        "the sum's own gradient lost",
    ),
)

MUTANTS = (*FORWARD, *BACKWARD, *IN_TORCH, *IN_HOST_CODE)
