"""Plausible mistakes in activation: each changes what is computed, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

FUSED = "activation/fused.py"
EAGER = "activation/eager.py"
HOST = "activation/__init__.py"

FORMULAS = (
    Mutant(FUSED, "tl.where(z >= 0, inverse, small * inverse)", "inverse", "sigmoid of a negative number"),
    Mutant(FUSED, "small * inverse * inverse\n", "small * inverse\n", "slope of the sigmoid"),
    Mutant(FUSED, "small = tl.exp(-tl.abs(z))", "small = tl.exp(-z)", "sigmoid overflows"),
    Mutant(FUSED, "tl.erf(x * 0.7071067811865476)", "tl.erf(x)", "erf without the square root of two"),
    Mutant(FUSED, "share = 0.5 * (1.0 + tl.erf", "share = 0.5 + (1.0 + tl.erf", "half added"),
    Mutant(
        FUSED,
        "0.3989422804014327 * tl.exp(-0.5 * x * x)",
        "0.3989422804014327 * tl.exp(-x * x)",
        "density of gelu",
    ),
    Mutant(FUSED, "share_slope = 0.3989422804014327 * ", "share_slope = ", "density of gelu not normalised"),
    Mutant(FUSED, "0.044715 * x * x", "0.044715 * x", "gelu_tanh without the cube"),
    Mutant(FUSED, "0.134145 * x * x", "0.044715 * x * x", "derivative of the cube"),
    Mutant(
        FUSED,
        "share_slope = slope_2z * 1.5957691216057308",
        "share_slope = slope_2z * 0.7978845608028654",
        "half the slope",
    ),
    Mutant(FUSED, "sigmoid_and_slope(1.5957691216057308", "sigmoid_and_slope(0.7978845608028654", "half the argument"),
    Mutant(FUSED, "share + x * share_slope", "share + share_slope", "product rule"),
    Mutant(FUSED, "share + x * share_slope", "x * share_slope", "product rule, other half"),
    Mutant(FUSED, "sigmoid_and_slope(1.702 * x)", "sigmoid_and_slope(1.7 * x)", "a rounded constant"),
    Mutant(FUSED, "share_slope = 1.702 * slope_z", "share_slope = slope_z", "chain rule of quick_gelu"),
    Mutant(FUSED, "slope = 2.0 * positive", "slope = positive", "half the slope of relu2"),
    Mutant(FUSED, "activated = positive * positive", "activated = positive", "relu for relu2"),
    Mutant(FUSED, "tl.where(x <= 0.0, 0.0, dx)", "tl.where(x < 0.0, 0.0, dx)", "slope of relu at zero"),
    Mutant(FUSED, "dx = tl.where(x <= 0.0, 0.0, dx)", "dx = dx", "a NaN where relu is flat"),
    Mutant(
        FUSED,
        "activated = tl.where(x <= 0.0, 0.0, x)",
        "activated = tl.where(x > 0.0, x, 0.0)",
        "relu hides a NaN",
    ),
)

PASSES = (
    Mutant(FUSED, "activated, _ = activate", "_, activated = activate", "derivative for the activation"),
    Mutant(FUSED, "_, slope = activate", "slope, _ = activate", "activation for its derivative"),
    Mutant(FUSED, "dx = dy * slope", "dx = slope", "incoming gradient forgotten"),
    Mutant(FUSED, "DY + row * stride_dy", "DY + row * stride_x", "strides of the incoming gradient ignored"),
    Mutant(FUSED, "_rows_and_cols(grad_output_NF, kept_NF)", "_rows_and_cols(kept_NF)", "flattens a strided gradient"),
    Mutant(
        FUSED,
        "        x_NF.stride(0),\n        y_NF",
        "        n_cols,\n        y_NF",
        "takes the input for contiguous",
    ),
)

IN_TORCH = (
    Mutant(EAGER, '"tanh" if name == "gelu_tanh" else "none"', '"none"', "gelu for gelu_tanh"),
    Mutant(EAGER, "torch.mul(grad, x).mul_(2)", "torch.mul(grad, x)", "half the slope of relu2"),
    Mutant(
        EAGER,
        "torch.square(torch.clamp_min(x, 0, out=out), out=out)",
        "torch.clamp_min(x, 0, out=out)",
        "relu for relu2",
    ),
    Mutant(EAGER, ".sigmoid_().mul_(x)", ".sigmoid_()", "a sigmoid for quick_gelu"),
    Mutant(EAGER, "x.to(wide) * 1.702)", "x.to(wide))", "silu's slope for quick_gelu's"),
    Mutant(EAGER, "torch.mul(grad, x).mul_(2)", "torch.add(grad, x).mul_(2)", "added for multiplied"),
)

IN_HOST_CODE = (
    Mutant(HOST, 'output[0] if ctx.name == "relu" else x', "output[0]", "keeps the output of every activation"),
    Mutant(HOST, "return _call(x, name, implementation)[0]", 'return _call(x, "silu", implementation)[0]', "name lost"),
    Mutant(
        HOST,
        "rows(kept), name)\n",
        'rows(kept), "silu")\n',
        "name lost in backward",
    ),
)

MUTANTS = (*FORMULAS, *PASSES, *IN_TORCH, *IN_HOST_CODE)
