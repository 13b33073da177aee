"""Plausible mistakes in add_rms_norm: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

FUSED = "rms_norm/add_fused.py"
EAGER = "rms_norm/add_eager.py"
HOST = "rms_norm/__init__.py"

FORWARD = (
    Mutant(FUSED, "(x * scale).to(X.dtype.element_ty).to(tl.float32)", "x * scale", "product not rounded"),
    Mutant(FUSED, "(x * scale).to(X", "x.to(X", "scale forgotten"),
    Mutant(FUSED, "h = (residual + scaled)", "h = (residual * scale + x)", "scale on the residual"),
    Mutant(FUSED, "h = (residual + scaled)", "h = (residual - scaled)", "sign of the branch"),
    Mutant(FUSED, "h = (residual + scaled)", "h = (scaled)", "residual forgotten"),
    Mutant(FUSED, "h_wide = h.to(tl.float32)", "h_wide = residual + scaled", "normalises the sum before it is rounded"),
    Mutant(
        FUSED, "(residual + scaled).to(H.dtype", "(residual + scaled).to(X.dtype", "sum rounded to the branch's dtype"
    ),
    Mutant(FUSED, "tl.sum(h_wide * h_wide, 0) / n_cols + eps", "tl.sum(h_wide * h_wide, 0) / n_cols", "eps forgotten"),
    Mutant(
        FUSED,
        "tl.sum(h_wide * h_wide, 0) / n_cols + eps",
        "tl.sum(h_wide * h_wide, 0) / BLOCK + eps",
        "mean over the padded row",
    ),
    Mutant(FUSED, "y = y.to(H.dtype.element_ty).to(tl.float32)", "y = y.to(tl.float32)", "rounds once only"),
    Mutant(FUSED, "y = y.to(H.dtype.element_ty)", "y = y.to(X.dtype.element_ty)", "rounds to the branch's dtype"),
    Mutant(FUSED, "            y = y * w\n", "            y = y + w\n", "weight added"),
    Mutant(FUSED, "tl.store(RSTD + row, rstd)", "tl.store(RSTD + row, rstd * rstd)", "saves the wrong statistic"),
    Mutant(FUSED, "X + start * stride_x + cols", "X + start * n_cols + cols", "strides of the branch ignored"),
    Mutant(
        FUSED,
        "RESIDUAL + start * stride_residual + cols",
        "RESIDUAL + start * stride_x + cols",
        "residual by x's strides",
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
)

BACKWARD = (
    Mutant(FUSED, "            grad += tl.load(DH", "            grad = tl.load(DH", "only the sum's own gradient"),
    Mutant(FUSED, "HAS_DH=grad_h_NH is not None", "HAS_DH=False", "the sum's own gradient forgotten"),
    Mutant(FUSED, "(grad * scale).to(DX", "grad.to(DX", "scale forgotten"),
    Mutant(FUSED, "grad.to(DRESIDUAL", "(grad * scale).to(DRESIDUAL", "residual scaled too"),
    Mutant(FUSED, "other=0.0).to(tl.float32) + offset\n", "other=0.0).to(tl.float32)\n", "offset forgotten"),
    Mutant(FUSED, "tl.sum(dy * normed, 0) / n_cols", "tl.sum(dy * normed, 0) / BLOCK", "mean over the padded row"),
    Mutant(FUSED, "(dy - normed * along_normed) * rstd", "dy * rstd", "projection forgotten"),
    Mutant(FUSED, "(dy - normed * along_normed) * rstd", "dy - normed * along_normed", "rstd forgotten"),
    Mutant(FUSED, "            dy = dy * w\n", "            dy = dy + 0 * w\n", "weight forgotten"),
    Mutant(FUSED, "dw += dy * normed.to(", "dw = dy * normed.to(", "dweight of the last row only"),
    Mutant(
        FUSED, "                dw += dy * normed\n", "                dw += dy * h\n", "dweight of h not normalised"
    ),
    Mutant(FUSED, "start * stride_dh", "start * stride_dy", "strides of the sum's gradient ignored"),
    Mutant(FUSED, "start * stride_dy", "start * n_cols", "strides of the norm's gradient ignored"),
    Mutant(FUSED, "sum_partials(partial_PH, ", "sum_partials(partial_PH[:1], ", "dweight of one program only"),
    Mutant(FUSED, "torch.zeros_like(weight_H)", "torch.empty_like(weight_H)", "dweight of no row is not set"),
)

IN_TORCH = (
    Mutant(EAGER, "x_NH if scale == 1.0 else x_NH * scale", "x_NH", "scale forgotten"),
    Mutant(EAGER, "residual_NH + (x_NH", "residual_NH.add_(x_NH", "writes into the residual"),
    Mutant(EAGER, "grad_NH += grad_h_NH", "pass", "the sum's own gradient forgotten"),
    Mutant(EAGER, "grad_NH += grad_h_NH", "grad_NH = grad_h_NH.add_(grad_NH)", "writes into the incoming gradient"),
    Mutant(EAGER, "(grad_NH * scale).to(x_dtype)", "grad_NH.to(x_dtype)", "scale of the gradient forgotten"),
    Mutant(EAGER, "(grad_NH * scale)", "grad_NH.mul_(scale)", "scales the residual's gradient too"),
)

IN_HOST_CODE = (
    Mutant(HOST, "ctx.needs_input_grad[2]", "ctx.needs_input_grad[1]", "asks for the residual, not the weight"),
    Mutant(
        HOST, "grad_x if apart else grad_residual, grad_residual,", "grad_residual, grad_residual,", "x like residual"
    ),
    Mutant(HOST, "(grad_h * ctx.scale)", "(grad_h * 1)", "scale forgotten where the norm is not used"),
    Mutant(HOST, "rows(grad_y), grad_h_NH, rows(h)", "rows(grad_y), None, rows(h)", "the sum's own gradient dropped"),
    Mutant(
        HOST,
        "_call_add(x, residual, weight, eps, offset, order, scale,",
        "_call_add(x, residual, weight, eps, offset, order, 1.0,",
        "scale lost",
    ),
    Mutant(
        HOST,
        "_call_add(x, residual, weight, eps, offset",
        "_call_add(residual, x, weight, eps, offset",
        "branch and residual exchanged",
    ),
)

MUTANTS = (*FORWARD, *BACKWARD, *IN_TORCH, *IN_HOST_CODE)
