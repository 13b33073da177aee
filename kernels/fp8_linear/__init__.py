"""fp8_linears: linears of one input whose three products take 8-bit values.

    x = s_x q_x      W_i = s_W q_Wi      dy = s_g q_g                  q: E4M3, s: powers of two (scaling.py)
    y_i = s_x s_W q_x q_Wi^T + b_i       dx = s_g s_W q_g q_W          dW_i = s_g s_x q_gi^T q_x        db_i = sum over rows of dy_i

q_W: the weights one below the other, q_g: the gradients side by side, so that dx is one product, where linears on their own would
add one [N, H] for each. "tensorwise": one scale for each of x, the weights and the gradients. "rowwise": one for each row of x, of
W and, in dx, of dy; one for each column of dy in dW. What a product sums over can have no scale of its own: there the scale of the
other operand is a factor of dy before its cast (casts.py). So x and W are cast once, and dx and dW are exactly of what was
multiplied in forward. Delayed scaling (delayed.py): tensorwise, with the scales of x and dy from the calls before (history.py), so
that each is read once.

FLOPs as the plain linears: 2 N H F forward, twice that backward. Bytes beyond the products' own, of a cast: read 2 for the largest
value and 2 again, write 1, and 1 for its transpose, each an element. Saved for backward: q_x transposed (1 byte an element), only
where a weight trains, in place of x (2 bytes); with a `Source` (kernels/recompute.py) that instead. Weights are cast once a step.

Sources: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024 (E4M3 for
gradients too).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from automodel_accel.kernels.contract import AUTO, Implementation, Kernel, implementation_module, in_te, in_triton
from automodel_accel.kernels.fp8_linear import noted, reference
from automodel_accel.kernels.fp8_linear.casts import Cast
from automodel_accel.kernels.fp8_linear.history import Histories
from automodel_accel.kernels.fp8_linear.products import ARCHS, engine_on, product
from automodel_accel.kernels.fp8_linear.scaling import formats_here
from automodel_accel.kernels.fp8_linear.sharded import is_gathered, joined
from automodel_accel.kernels.fp8_linear.weights import HeldCast
from automodel_accel.kernels.recompute import Source

MULTIPLE = 16  # of in_features and out_features: what the hardware multiplies
FIRST = 2  # of the weights among the inputs
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

SCALES = frozenset({"rowwise", "delayed"})  # beyond one of each tensor and call
LACKS = {
    "rowwise": "has one scale for a tensor, where the recipe has one for each row",
    "delayed": "has the scale of each call, where the recipe has that of the calls before",
}

KERNEL = Kernel(
    name="fp8_linear",
    reference=reference.fp8_linears,  # type: ignore[arg-type]  # several outputs
    implementations=(
        in_triton(
            "automodel_accel.kernels.fp8_linear.casts_fused", features=SCALES, archs=ARCHS
        ),  # elsewhere the formats do not compile
        Implementation(
            name="torch",
            module="automodel_accel.kernels.fp8_linear.casts",
            devices=frozenset({"cuda", "xpu", "cpu", "mps"}),
            dtypes=DTYPES,
            features=SCALES,
        ),
        in_te("automodel_accel.kernels.fp8_linear.te", frozenset(), LACKS, archs=("sm_90",)),
    ),
)
DELAYED = Kernel(
    name="fp8_linear_delayed",
    reference=KERNEL.reference,
    implementations=tuple(
        replace(one, module=f"automodel_accel.kernels.fp8_linear.{file}")
        for one, file in zip(KERNEL.implementations, ("delayed_fused", "delayed"), strict=False)
    ),
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How values are rounded to 8 bits.

    Attributes:
        rowwise: Whether each row has a scale of its own; else one serves the tensor.
        wide_gradients: Whether gradients are in E5M2 (2 bits of mantissa, a wider range) and not in E4M3.
        engine: "native" or "emulated" products; None: native where the machine has them.
        delayed: Whether the scales of x and of the gradients are those of the calls before, where `histories` are given.

    Raises:
        ValueError: delayed scales of rows, which differ from call to call.
    """

    rowwise: bool = False
    wide_gradients: bool = False
    engine: str | None = None
    delayed: bool = False

    def __post_init__(self) -> None:
        if self.rowwise and self.delayed:
            raise ValueError(
                "Recipe(rowwise=True, delayed=True): no call knows the rows of the next; expected one of them."
            )


def features(recipe: Recipe) -> frozenset[str]:
    """What a recipe asks for beyond one scale a tensor."""
    asked = {"rowwise": recipe.rowwise, "delayed": recipe.delayed}
    return frozenset(name for name, is_asked in asked.items() if is_asked)


def fp8_linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    recipe: Recipe = Recipe(),
    *,
    held: HeldCast | None = None,
    source: Source | None = None,
    histories: Histories | None = None,
    implementation: str = AUTO,
) -> tuple[torch.Tensor, ...]:
    """`F.linear(x, weight, bias)` for each weight, by products of 8-bit values; obeys autocast as that does.

    Args:
        x: [..., H], float32, bfloat16 or float16; H a multiple of 16.
        weights: [F_i, H] each, in one dtype; F_i a multiple of 16.
        biases: [F_i] each, or None.
        recipe: How values are rounded.
        held: Where the cast of these weights is kept while they stay as they are; None: cast now, and again in backward.
        source: What x was computed from, to be saved in place of its cast; see `source_of`.
        histories: Of the calls of these linears, for delayed scaling; None: current scaling.
        implementation: "auto", "triton", "torch" or "te": what casts.

    Returns:
        [..., F_i] for each weight, in x's dtype or autocast's.

    Raises:
        ValueError: a shape does not fit, or is no multiple of 16, a weight is a DTensor, or the implementation cannot serve the call.
    """
    _check(x, weights, biases)
    if x.numel() == 0:
        return tuple(torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    held = None if is_gathered(weights) else held
    kind = x.device.type
    module = implementation_module(KERNEL, kind, x.dtype, x.shape[-1], implementation, features(recipe))
    scaling = None
    if recipe.delayed and histories is not None:
        casts = implementation_module(DELAYED, kind, x.dtype, x.shape[-1], implementation, features(recipe))
        scaling = _Delayed(casts, histories)
    if not torch.is_autocast_enabled(kind):
        return _Fp8Linears.apply((module, recipe, held, source, scaling, x.dtype), x, *weights, *biases)  # type: ignore[no-any-return, no-untyped-call]
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):  # which would round inside of emulated products
        return _Fp8Linears.apply((module, recipe, held, source, scaling, dtype), x, *weights, *biases)  # type: ignore[no-any-return, no-untyped-call]


def _check(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
    if len(weights) != len(biases):
        raise ValueError(
            f"fp8_linears: {len(weights)} weights and {len(biases)} biases; expected one (or None) for each."
        )
    for weight in weights:
        if (placements := getattr(weight, "placements", None)) is not None:
            raise ValueError(
                f"fp8_linears: a weight is a DTensor that lies as {tuple(placements)}, expected a plain tensor: leave "
                "tensor-parallel linears out, or call this where FSDP2 has gathered the weight."
            )
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"fp8_linears: a weight has shape {tuple(weight.shape)}, expected [F, {x.shape[-1]}] for x {tuple(x.shape)}."
            )
        if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
            raise ValueError(
                f"fp8_linears: a weight has shape {tuple(weight.shape)}, expected multiples of {MULTIPLE}: the hardware takes no other."
            )


@dataclass(frozen=True, slots=True)
class _Delayed:
    """What casts x and the gradients by scales of the calls before, and these calls."""

    module: Any
    histories: Histories


class _Fp8Linears(torch.autograd.Function):
    """Not a registered operation: how many outputs it has varies, and torch.compile takes the plain linears."""

    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[Any, Recipe, HeldCast | None, Source | None, _Delayed | None, torch.dtype],
        x: torch.Tensor,
        *rest: Any,
    ) -> Any:
        module, recipe, held, source, delayed, dtype = how
        weights, biases = halves(rest)
        needs_w = any(halves(ctx.needs_input_grad[FIRST:])[0])
        engine = recipe.engine or engine_on(x.device.type)
        cast = functools.partial(module.cast_rows, dtype=formats_here().e4m3, rowwise=recipe.rowwise)

        def cast_weights(weights: Sequence[torch.Tensor], transposed: bool) -> Cast:
            return joined(weights, recipe.rowwise) or cast(weights, transposed=transposed)

        key = (module, recipe.rowwise, needs_w)
        if held is None:  # cast again in backward
            of_w = cast_weights(weights, False)
        else:
            of_w = held.of(weights, key, lambda: cast_weights(weights, needs_w))
        if delayed is None:
            cast_x: Any = cast
            of_x = _cast_of_input(x, cast, recipe, needs_w and source is None)
        else:
            cast_x = functools.partial(delayed.module.cast, dtype=formats_here().e4m3, history=delayed.histories.x)
            of_x = cast_x([x.reshape(-1, x.shape[-1])], transposed=needs_w and source is None)
            cast_x = functools.partial(cast_x, scale=of_x.scale)  # again in backward
        widths = [len(weight) for weight in weights]
        assert of_w.q is not None
        outputs = tuple(
            _shaped(product(of_x.q, q, of_x.scale, scale, bias, dtype, engine, fast=True), x)
            for q, scale, bias in zip(torch.split(of_w.q, widths), _scales(of_w.scale, widths), biases, strict=True)
        )
        kept = () if not needs_w else (of_x.q_t, of_x.scale) if source is None else source.tensors
        ctx.save_for_backward(*(weights if held is None else ()), *kept)
        ctx.of_w, ctx.again = (of_w, None) if held is not None else (None, cast_weights)
        ctx.held = held
        ctx.cast, ctx.module, ctx.recipe, ctx.engine, ctx.source = cast_x, module, recipe, engine, source
        ctx.delayed = delayed
        ctx.widths, ctx.x_shape, ctx.x_dtype, ctx.dtype = widths, x.shape, x.dtype, dtype
        ctx.dtypes = [None if one is None else one.dtype for one in rest]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fp8_linear cannot be differentiated twice: its gradient was asked for with create_graph=True; "
                "apply(model, fp8=False)."
            )
        saved = list(ctx.saved_tensors)  # once: a checkpoint gives each tensor out once
        count, rowwise = len(ctx.widths), ctx.recipe.rowwise
        weights = [saved.pop(0) for _ in range(count)] if ctx.again else []
        needs_x, *needed = ctx.needs_input_grad[FIRST - 1 :]
        needs_w, needs_b = halves(needed)
        of_x = _cast_again(ctx, saved) if any(needs_w) else None
        of_w = None if not needs_x else ctx.again(weights, True) if ctx.again else ctx.of_w
        given = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        straight, turned = _cast_gradients(ctx, given, of_w, of_x)
        grad_x: torch.Tensor | None = None
        grad_weights: list[torch.Tensor | None] = [None] * count
        if of_w is not None:
            q_t = ctx.module.transposed(of_w.q) if of_w.q_t is None else of_w.q_t
            scale = None if rowwise else of_w.scale
            grad_x = product(straight.q, q_t, straight.scale, scale, None, ctx.dtype, ctx.engine)
            grad_x = grad_x.to(ctx.x_dtype).view(ctx.x_shape)
        if of_x is not None:
            if ctx.held is not None:
                ctx.held.passed = True
            scale, x_t = None if rowwise else of_x.scale, of_x.q_t
            assert x_t is not None
            parts = zip(turned.q_t.split(ctx.widths), _scales(turned.scale, ctx.widths), strict=True)
            grad_weights = [
                product(q, x_t, of_q, scale, None, ctx.dtype, ctx.engine).to(dtype) if wanted else None
                for (q, of_q), wanted, dtype in zip(parts, needs_w, ctx.dtypes, strict=False)
            ]
        grad_biases = [
            grad.sum(0).to(dtype) if wanted else None
            for grad, wanted, dtype in zip(given, needs_b, ctx.dtypes[count:], strict=True)
        ]
        return None, grad_x, *grad_weights, *grad_biases


def halves(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Of the weights, and of the biases."""
    return values[: len(values) // 2], values[len(values) // 2 :]


def _cast_gradients(ctx: Any, given: Sequence[torch.Tensor], of_w: Cast | None, of_x: Cast | None) -> tuple[Any, Any]:
    formats = formats_here()
    dtype = formats.e5m2 if ctx.recipe.wide_gradients else formats.e4m3
    if ctx.delayed is None or (of_w is None and of_x is None):
        scales = {"weight_scale": of_w and of_w.scale, "x_scale": of_x and of_x.scale}
        return ctx.module.cast_gradients(given, dtype, ctx.recipe.rowwise, **scales)  # type: ignore[no-any-return]
    asked = {"straight": of_w is not None, "transposed": of_x is not None}
    both = ctx.delayed.module.cast(given, dtype, ctx.delayed.histories.gradients, **asked)
    return both, both


def _cast_of_input(x: torch.Tensor, cast: Any, recipe: Recipe, transposed: bool) -> Any:
    """The cast of x [..., H]: as its producer noted it, or from what it noted, or from all of it."""
    found = noted.cast_of(x) if recipe.rowwise and not transposed else None
    if found is not None:
        return found
    return cast([x.reshape(-1, x.shape[-1])], transposed=transposed, amax_R=noted.maxima_of(x))


def _shaped(y_NF: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[..., F]; no view, into which autograd would let nobody write."""
    return torch.ops.aten._unsafe_view(y_NF, [*x.shape[:-1], y_NF.shape[1]])  # type: ignore[no-any-return]


def _cast_again(ctx: Any, kept: Sequence[torch.Tensor]) -> Cast:
    """The transposed cast of x: as it was kept, or of x computed again."""
    if ctx.source is None:
        q_t, scale = kept
        return Cast(None, q_t, scale)
    x = ctx.source.again(tuple(kept)).reshape(-1, ctx.x_shape[-1])
    return ctx.cast([x], straight=False, transposed=True)  # type: ignore[no-any-return]


def _scales(scale: torch.Tensor, widths: Sequence[int]) -> Sequence[torch.Tensor]:
    """Of each of the tensors in a cast."""
    return torch.split(scale, list(widths)) if scale.dim() else [scale] * len(widths)
