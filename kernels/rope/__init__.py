"""rope: rotary position embedding of queries and keys, in one launch.

Each head's leading R elements are pairs (a, b), turned by the angle of the token's position and of the pair:

    y_1 = cos_1 a - sin_1 b         y_2 = cos_2 b + sin_2 a         the other D - R elements are copied

    da = cos_1 dy_1 + sin_2 dy_2    db = cos_2 dy_2 - sin_1 dy_1

The two values of cos and sin of a pair need not be equal: the gradient is exact for any. Models differ in which elements are
a pair: `layout="half"` pairs i with i + R/2 (Llama, GPT-NeoX), "interleaved" pairs 2i with 2i + 1 (GPT-J, Cohere), and
"deinterleaved" takes its pairs interleaved and yields halves (DeepSeek). Source: Su et al., "RoFormer", 2021.

Computed in float32, rounded once. Saved for backward: cos and sin. Floor: 2 passes over q and k, forward and backward.
"""

from typing import Any

import torch

from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_torch, in_triton, unknown_name
from automodel_accel.kernels.registration import Definition, register
from automodel_accel.kernels.rope import reference

LAYOUTS = ("half", "interleaved", "deinterleaved")

KERNEL = Kernel(
    name="rope",
    reference=reference.rotate,
    implementations=(
        in_triton("automodel_accel.kernels.rope.fused"),
        in_torch("automodel_accel.kernels.rope.eager"),
    ),
)


def rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str = "half",
    head_axis: int = 1,
    per_pair: bool = False,
    inverse: bool = False,
    keep_dtype: bool = False,
    implementation: str = AUTO,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate queries and keys; cos and sin get no gradient.

    Args:
        q: [B, H, S, D] of any strides, float32, bfloat16, float16 (or float64 for "torch"); [B, S, H, D] with `head_axis=2`;
            or without B, where `head_axis` is 0 or 1.
        k: Likewise, of q's dtype, with any number of heads; or None.
        cos: [S, R], [1, S, R] or [B, S, R], R <= D; with `per_pair`, [..., R / 2].
        sin: Of cos's shape and dtype.
        layout: "half", "interleaved" or "deinterleaved": which elements are a pair.
        head_axis: Axis of the heads in q and k; the axis of the tokens is its neighbour.
        per_pair: cos and sin hold one value a pair, not one an element.
        inverse: Turn the other way, by minus the angle.
        keep_dtype: Return q's dtype even where cos is wider.
        implementation: "auto", "triton" or "torch".

    Returns:
        q and k rotated, in their shapes and orders of strides and in the dtype that torch would give, the wider of q's and cos's.

    Raises:
        ValueError: shapes or dtypes do not fit, cos or sin wants a gradient, a name is unknown, or the implementation cannot
            serve the call.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"rope: {unknown_name('layout', layout, LAYOUTS)}")
    problem = misfit(q, k, cos, sin, head_axis, per_pair)
    if problem is not None:
        raise ValueError(f"rope: {problem}.")
    options = (layout, head_axis, per_pair, inverse, keep_dtype, implementation)
    q_out, k_out = _call(q, k, cos, sin, *options)
    return q_out, None if k is None else k_out


def misfit(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, head_axis: int, per_pair: bool
) -> str | None:
    """What is wrong with a call of `rope`: what came and what was expected; None where all fits."""
    if head_axis not in (q.dim() - 3, q.dim() - 2) or q.dim() not in (3, 4):
        return f"head_axis={head_axis} for q {tuple(q.shape)}, expected [B, H, S, D] with 1, [B, S, H, D] with 2, or one less without B"
    batch, tokens, _, head_dim = sizes(q, head_axis)
    if (cos.shape, cos.dtype) != (sin.shape, sin.dtype):
        return f"cos is {tuple(cos.shape)} {cos.dtype}, sin is {tuple(sin.shape)} {sin.dtype}, expected the same"
    if cos.requires_grad or sin.requires_grad:
        return "cos or sin wants a gradient, expected tables without one"
    if (
        cos.dim() not in (2, q.dim() - 1)
        or cos.shape[-2] != tokens
        or (cos.dim() == 3 and cos.shape[0] not in (1, batch))
    ):
        return f"cos is {tuple(cos.shape)}, expected [..., {tokens}, R] for q {tuple(q.shape)}"
    rotary_dim = cos.shape[-1] * (2 if per_pair else 1)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        return (
            f"cos is {tuple(cos.shape)}, which rotates {rotary_dim} elements, expected an even number up to {head_dim}"
        )
    if k is None:
        return None
    if k.dtype != q.dtype or k.dim() != q.dim():
        return (
            f"k is {tuple(k.shape)} {k.dtype}, q is {tuple(q.shape)} {q.dtype}, expected the same dtype and dimensions"
        )
    k_batch, k_tokens, _, k_dim = sizes(k, head_axis)
    if (k_batch, k_tokens, k_dim) != (batch, tokens, head_dim):
        return f"k is {tuple(k.shape)}, q is {tuple(q.shape)}, expected the same but for the number of heads"
    return None


def token_major(x: torch.Tensor, head_axis: int) -> torch.Tensor:
    """A view [B, S, H, D]."""
    if x.dim() == 3:
        x, head_axis = x[None], head_axis + 1
    return x.transpose(1, 2) if head_axis == 1 else x


def sizes(x: torch.Tensor, head_axis: int) -> tuple[int, int, int, int]:
    """(B, S, H, D), without the host time of a view."""
    *batch, first, second, head_dim = x.shape
    heads_first = head_axis == x.dim() - 3
    tokens, heads = (second, first) if heads_first else (first, second)
    return batch[0] if batch else 1, tokens, heads, head_dim


def _out_dtype(q: torch.Tensor, cos: torch.Tensor, keep_dtype: bool) -> torch.dtype:
    return q.dtype if keep_dtype else torch.promote_types(q.dtype, cos.dtype)


def _module(x: torch.Tensor, implementation: str) -> Any:
    return implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation)


def batched(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """cos and sin as [B or 1, S, R]."""
    return tuple(table[None] if table.dim() == 2 else table for table in (cos, sin))


def _forward(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    head_axis: int,
    per_pair: bool,
    inverse: bool,
    keep_dtype: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = _fake_forward(q, k, cos, sin, layout, head_axis, per_pair, inverse, keep_dtype, implementation)
    pairs = [(q, outputs[0]), *([] if k is None else [(k, outputs[1])])]
    xs, ys = zip(*((token_major(x, head_axis), token_major(y, head_axis)) for x, y in pairs), strict=True)
    _module(q, implementation).forward(xs, ys, *batched(cos, sin), layout, per_pair, inverse)
    return outputs


def _fake_forward(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    head_axis: int,
    per_pair: bool,
    inverse: bool,
    keep_dtype: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _out_dtype(q, cos, keep_dtype)
    return empty_like(q, dtype), q.new_empty(0) if k is None else empty_like(k, dtype)


def empty_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In x's order of strides, as torch would lay it out, but for a head whose elements are not side by side."""
    memory_format = torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format)


def _backward(
    grad_q_out: torch.Tensor | None,
    grad_k_out: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtype: torch.dtype,
    layout: str,
    head_axis: int,
    per_pair: bool,
    inverse: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    grads = _fake_backward(
        grad_q_out, grad_k_out, cos, sin, dtype, layout, head_axis, per_pair, inverse, implementation
    )
    pairs = [(dy, dx) for dy, dx in zip((grad_q_out, grad_k_out), grads, strict=True) if dy is not None]
    dys, dxs = zip(*((token_major(dy, head_axis), token_major(dx, head_axis)) for dy, dx in pairs), strict=True)
    _module(pairs[0][1], implementation).backward(dys, dxs, *batched(cos, sin), layout, per_pair, inverse)
    return grads


def _fake_backward(
    grad_q_out: torch.Tensor | None,
    grad_k_out: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtype: torch.dtype,
    layout: str,
    head_axis: int,
    per_pair: bool,
    inverse: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (
        cos.new_empty(0) if grad is None else empty_token_major(grad, head_axis, dtype)
        for grad in (grad_q_out, grad_k_out)
    )
    return first, second


def empty_token_major(like: torch.Tensor, head_axis: int, dtype: torch.dtype) -> torch.Tensor:
    """Of the shape of `like`, in the memory order [B, S, H, D] that a projection before q or k reads its gradient in."""
    batch, tokens, heads, head_dim = sizes(like, head_axis)
    empty = like.new_empty((batch, tokens, heads, head_dim), dtype=dtype)
    laid_out = empty.transpose(1, 2) if head_axis == like.dim() - 3 else empty
    return laid_out if like.dim() == 4 else laid_out[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, _, cos, sin, ctx.layout, ctx.head_axis, ctx.per_pair, ctx.inverse, _, ctx.implementation = inputs
    ctx.dtype = q.dtype
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, grad_outputs: tuple[torch.Tensor | None, ...], backward: Any) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    needed = [grad if needs else None for grad, needs in zip(grad_outputs, ctx.needs_input_grad[:2], strict=True)]
    if all(grad is None for grad in needed):
        return (None,) * 10
    options = (ctx.dtype, ctx.layout, ctx.head_axis, ctx.per_pair, ctx.inverse, ctx.implementation)
    grads = backward(*needed, cos, sin, *options)
    q_and_k = (None if wanted is None else grad for wanted, grad in zip(needed, grads, strict=True))
    return (*q_and_k, *(None,) * 8)


_call = register(
    "rope",
    Definition(
        forward=_forward,
        backward=_backward,
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        gradients=_gradients,
        differentiable=2,
    ),
)
