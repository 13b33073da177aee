"""qk_norm_rope: root mean square normalisation of each head of queries and keys, then their rotation, in one launch.

    n = x * rstd * (weight + offset)      rstd = 1 / sqrt(mean over the head of x^2 + eps)      y = R n, as in rope

    dn = R^T dy      g = dn * (weight + offset)      x_hat = x * rstd      dx = rstd * (g - x_hat * mean(g * x_hat))
    dweight = sum over tokens and heads of dn * x_hat

That is what attention does whose norms feed the rotary (Qwen3, Gemma 3). Computed in float32 and rounded once, where the
two operations round in between. Sources: Henry et al., "Query-Key Normalization for Transformers", 2020; and those of rms_norm
and rope.

Saved for backward: q and k as they came, one float a head, cos and sin. Floor: 2 passes over q and k forward (norm and rotary
apart: 4), 3 backward (apart: 5); about 10 and 20 FLOPs an element.
"""

from typing import Any

import torch

from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_torch, in_triton, unknown_name
from automodel_accel.kernels.qk_norm_rope import reference
from automodel_accel.kernels.registration import Definition, register
from automodel_accel.kernels.rms_norm import ORDERS
from automodel_accel.kernels.rope import LAYOUTS, batched, empty_like, empty_token_major, misfit, sizes, token_major

KERNEL = Kernel(
    name="qk_norm_rope",
    reference=reference.normalise_and_rotate,
    implementations=(
        in_triton("automodel_accel.kernels.qk_norm_rope.fused"),
        in_torch("automodel_accel.kernels.qk_norm_rope.eager"),
    ),
)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    order: str = "cast_then_mul",
    layout: str = "half",
    head_axis: int = 1,
    per_pair: bool = False,
    inverse: bool = False,
    keep_dtype: bool = False,
    implementation: str = AUTO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the heads of queries and keys and rotate them; cos and sin get no gradient.

    Args:
        q: [B, H, S, D] of any strides, or [B, S, H, D], or without B, as for `rope`.
        k: Likewise, of q's dtype, with any number of heads.
        q_weight: [D], of any floating dtype.
        k_weight: [D], of q_weight's dtype.
        cos: As for `rope`, and so are sin, layout, head_axis, per_pair, inverse.
        sin: Of cos's shape and dtype.
        eps: Added to the mean square.
        offset: Added to the weights; 1.0 for models that store weight - 1.
        order: "cast_then_mul" or "mul_then_cast", as for `rms_norm`: what dtype the norm has, the wider of q's and the weight's,
            or q's.
        layout: "half", "interleaved" or "deinterleaved".
        head_axis: Axis of the heads in q and k.
        per_pair: cos and sin hold one value a pair, not one an element.
        inverse: Turn the other way.
        keep_dtype: Return the norm's dtype even where cos is wider.
        implementation: "auto", "triton" or "torch".

    Returns:
        q and k in their shapes and orders of strides, in the wider of the norm's dtype and cos's.

    Raises:
        ValueError: shapes or dtypes do not fit, cos or sin wants a gradient, a name is unknown, or the implementation cannot
            serve the call.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"qk_norm_rope: {unknown_name('layout', layout, LAYOUTS)}")
    if order not in ORDERS:
        raise ValueError(f"qk_norm_rope: {unknown_name('order', order, ORDERS)}")
    problem = misfit(q, k, cos, sin, head_axis, per_pair) or _misfit_of_weights(q, q_weight, k_weight)
    if problem is not None:
        raise ValueError(f"qk_norm_rope: {problem}.")
    options = (eps, offset, order, layout, head_axis, per_pair, inverse, keep_dtype, implementation)
    q_out, k_out, *_ = _call(q, k, q_weight, k_weight, cos, sin, *options)
    return q_out, k_out


def _misfit_of_weights(q: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor) -> str | None:
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != q.shape[-1:] or weight.dtype != q_weight.dtype:
            return f"{name} is {tuple(weight.shape)} {weight.dtype}, expected ({q.shape[-1]},) {q_weight.dtype}"
    return None


def _out_dtype(q: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, order: str, keep_dtype: bool) -> torch.dtype:
    normed = torch.promote_types(q.dtype, weight.dtype) if order == "cast_then_mul" else q.dtype
    return normed if keep_dtype else torch.promote_types(normed, cos.dtype)


def _module(x: torch.Tensor, implementation: str) -> Any:
    return implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    order: str,
    layout: str,
    head_axis: int,
    per_pair: bool,
    inverse: bool,
    keep_dtype: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    names = (order, layout, head_axis, per_pair, inverse, keep_dtype, implementation)
    q_out, k_out, *rstds = _fake_forward(q, k, q_weight, k_weight, cos, sin, eps, offset, *names)
    xs, ys = ([token_major(x, head_axis) for x in pair] for pair in ((q, k), (q_out, k_out)))
    form = (*batched(cos, sin), eps, offset, layout, per_pair, inverse)
    _module(q, implementation).forward(xs, ys, (q_weight, k_weight), rstds, *form)
    return q_out, k_out, rstds[0], rstds[1]


def _fake_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    order: str,
    layout: str,
    head_axis: int,
    per_pair: bool,
    inverse: bool,
    keep_dtype: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = _out_dtype(q, q_weight, cos, order, keep_dtype)
    wide = torch.promote_types(q.dtype, torch.float32)
    q_rstd, k_rstd = (x.new_empty(sizes(x, head_axis)[:3], dtype=wide) for x in (q, k))
    return empty_like(q, dtype), empty_like(k, dtype), q_rstd, k_rstd


def _backward(
    grad_q_out: torch.Tensor,
    grad_k_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_rstd: torch.Tensor,
    k_rstd: torch.Tensor,
    offset: float,
    layout: str,
    head_axis: int,
    per_pair: bool,
    inverse: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = [empty_token_major(x, head_axis, x.dtype) for x in (q, k)]
    dys, xs, dxs = ([token_major(x, head_axis) for x in pair] for pair in ((grad_q_out, grad_k_out), (q, k), grads))
    form = (*batched(cos, sin), offset, layout, per_pair, inverse)
    module = _module(q, implementation)
    grad_weights = module.backward(dys, xs, (q_weight, k_weight), (q_rstd, k_rstd), dxs, *form)
    return grads[0], grads[1], grad_weights[0], grad_weights[1]


def _fake_backward(
    grad_q_out: torch.Tensor,
    grad_k_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_rstd: torch.Tensor,
    k_rstd: torch.Tensor,
    offset: float,
    layout: str,
    head_axis: int,
    per_pair: bool,
    inverse: bool,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_q, grad_k = (empty_token_major(x, head_axis, x.dtype) for x in (q, k))
    return grad_q, grad_k, q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, ctx.offset, _, ctx.layout, ctx.head_axis, ctx.per_pair, ctx.inverse, _, ctx.implementation = inputs[6:]
    ctx.output_dtype = output[0].dtype
    ctx.save_for_backward(*inputs[:6], *output[2:])


def _gradients(ctx: Any, grad_outputs: tuple[torch.Tensor | None, ...], backward: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    # an output that nobody used has a gradient of zero: one launch serves q and k
    given = [
        x.new_zeros(x.shape, dtype=ctx.output_dtype) if grad is None else grad
        for x, grad in zip(saved[:2], grad_outputs, strict=True)
    ]
    options = (ctx.offset, ctx.layout, ctx.head_axis, ctx.per_pair, ctx.inverse, ctx.implementation)
    grads = backward(*given, *saved, *options)
    used = [grad_outputs[0] is not None, grad_outputs[1] is not None] * 2
    wanted = zip(grads, used, ctx.needs_input_grad[:4], strict=True)
    return (*(grad if is_used and needs else None for grad, is_used, needs in wanted), *(None,) * 11)


_call = register(
    "qk_norm_rope",
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
