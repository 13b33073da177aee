"""Plausible mistakes in FP8 linears: each changes what is computed or kept, none crashes."""

from tests.ops.mutation import Mutant

CASTS, HOST, WEIGHTS = "fp8_linear/casts.py", "fp8_linear/__init__.py", "fp8_linear/weights.py"

VALUES = (
    Mutant(CASTS, "weight_scale.t()", "weight_scale.t() * 2", "the weights' scales are folded in wrongly"),
    Mutant(CASTS, "(joined * x_scale).t()", "joined.t()", "the scales of x are forgotten in the weights' gradients"),
    Mutant(CASTS, "amax_R if rowwise else", "amax_R / 4 if rowwise else", "rows saturate"),
    Mutant(CASTS, "scale_of(_largest(_amax(joined, 1)), dtype)", "scale_of(_amax(joined, 1)[-1], dtype)", "last row's"),
    Mutant(CASTS, ".clamp(-most, most)", ".clamp(-most, most / 2)", "saturates early"),
    Mutant(CASTS, "_amax(x, 1) for x in tensors", "_amax(x, 1) for x in tensors[:1] * len(tensors)", "first weight's"),
    Mutant(HOST, "scale, bias, dtype, engine, fast=True", "scale, None, dtype, engine, fast=True", "no bias"),
    Mutant(HOST, "_one(of_w.scale) if rowwise else", "of_w.scale[0, 0] if rowwise else", "a scale counted twice in dx"),
    Mutant(HOST, "_one(of_x.scale) if rowwise else", "of_x.scale[0, 0] if rowwise else", "a scale counted twice in dW"),
    Mutant(HOST, "grad.sum(0)", "grad.mean(0)", "gradient of the bias"),
    Mutant(
        HOST,
        "formats.e5m2 if ctx.recipe.wide_gradients else formats.e4m3",
        "formats.e4m3 if ctx.recipe.wide_gradients else formats.e5m2",
        "gradients in the other format",
    ),
)
"""Caught by values and gradients."""

HELD = (
    Mutant(WEIGHTS, "cleared or key != self._key or", "cleared or", "the version is not looked at"),
    Mutant(WEIGHTS, "self.cast is None or cleared or", "self.cast is None or", "a step by hand is not seen"),
    Mutant(WEIGHTS, "self.passed and any(", "any(", "cast again in each forward before the first backward"),
    Mutant(WEIGHTS, "weight.data_ptr(), weight._version, STEPS.count", "weight._version", "steps are not counted"),
    Mutant(WEIGHTS, "self._key, self._weights = key,", "self._key, self._weights = (),", "cast anew each time"),
)
"""Caught by what is cast again, and when."""

KEPT = (
    Mutant(HOST, "cast, recipe, needs_w and source is None)", "cast, recipe, True)", "x is transposed for nobody"),
    Mutant(HOST, "(weights if held is None else ())", "(rest if held is None else (x * 1,))", "x is kept as it came"),
)
"""Caught by what is saved."""
