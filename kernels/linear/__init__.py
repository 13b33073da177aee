"""linears: several linears of one input, with or without low-rank adapters, in one node of autograd.

    y_i = x W_i^T + b_i            dx = sum over i of dy_i W_i          dW_i = dy_i^T x          db_i = sum over rows of dy_i

and what an adapter adds to them (kernels/lora).

The GEMMs are torch's (cuBLAS), 2 N H sum(F_i) FLOPs forward and twice that backward. What one node saves: dx is accumulated by
the GEMMs themselves (beta = 1, in float32 before each rounding), where autograd adds the inputs' gradients in kernels of their
own: 3 passes over [N, H] for each linear beyond the first. And the input need not be kept: with a `Source` (kernels/recompute.py)
its source is saved, and x is computed again once for all of them. Source: Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", 2022.

Saved for backward: x or its source, and the weights; x only where a weight or an A has a gradient; of an adapter A, B and p.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from automodel_accel.kernels import lora
from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_torch, in_triton
from automodel_accel.kernels.linear import reference
from automodel_accel.kernels.lora import Adapter
from automodel_accel.kernels.recompute import Source

PLAIN = "linears without adapters"
KERNEL = Kernel(
    name="linear",
    reference=reference.linears,  # type: ignore[arg-type]  # several outputs
    implementations=(
        replace(
            in_triton("automodel_accel.kernels.linear.fused"),
            lacks={PLAIN: "computes what adapters add, and there are none"},
        ),
        in_torch("automodel_accel.kernels.linear.eager", features=frozenset({PLAIN})),
    ),
)
FIRST = 4  # of the weights among the inputs


def linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    adapters: Sequence[Adapter | None] = (),
    source: Source | None = None,
    implementation: str = AUTO,
) -> tuple[torch.Tensor, ...]:
    """`F.linear(x, weight, bias)` for each weight, plus what its adapter adds; obeys autocast as that does.

    Args:
        x: [..., H], any floating point dtype.
        weights: [F_i, H] each, in one dtype.
        biases: [F_i] each, or None.
        adapters: One, or None, for each weight; all in one dtype, in which they are computed (in autocast's, where that is on).
        source: What x was computed from, to be saved in its place; see `source_of`.
        implementation: "auto", "triton" (the adapters' part; the other products are torch's) or "torch".

    Returns:
        [..., F_i] for each weight.

    Raises:
        ValueError: a weight's or an adapter's shape does not fit, there is not one bias (or None) for each weight, or the
            implementation cannot serve the call.
    """
    if len(weights) != len(biases):
        raise ValueError(f"linears: {len(weights)} weights and {len(biases)} biases; expected one (or None) for each.")
    adapters = adapters or [None] * len(weights)
    for weight, adapter in zip(weights, adapters, strict=True):
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"linears: a weight has shape {tuple(weight.shape)}, expected [F, {x.shape[-1]}] for x {tuple(x.shape)}."
            )
        if adapter is not None and (problem := adapter.misfit(weight)):
            raise ValueError(f"linears: {problem}.")
    module = implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation)
    if (outputs := module.together(x, weights, biases, adapters, source)) is not None:
        return outputs  # type: ignore[no-any-return]
    forms = tuple(adapter and adapter.form for adapter in adapters)
    parts = ([adapter and adapter.a_RH for adapter in adapters], [adapter and adapter.b_FR for adapter in adapters])
    return _Linears.apply(source, implementation, forms, x, *weights, *biases, *parts[0], *parts[1])  # type: ignore[no-any-return, no-untyped-call]


def features(adapted: bool) -> frozenset[str]:
    """What linears ask of an implementation that is to be chosen for them, whether some have adapters or none."""
    return frozenset() if adapted else frozenset({PLAIN})


class _Linears(torch.autograd.Function):
    """Not a registered operation: how many outputs it has varies, and torch.compile takes the plain linears."""

    @staticmethod
    def forward(
        ctx: Any, source: Source | None, implementation: str, forms: lora.Forms, x: torch.Tensor, *rest: Any
    ) -> Any:
        weights, biases, a, b = quarters(rest)
        module = implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation)
        p, starts, ctx.states = _low_rank(module.low_rank, x, biases, a, b, forms)
        outputs = module.forward(x, weights, biases, starts)
        needs_weights, _, needs_a, _ = quarters(ctx.needs_input_grad[FIRST:])
        kept: tuple[torch.Tensor | None, ...] = (x,) if source is None else source.tensors
        kept = kept if any((*needs_weights, *needs_a)) else ()
        ctx.save_for_backward(*weights, *a, *b, *p, *kept)
        ctx.source, ctx.module, ctx.count, ctx.forms = source, module, len(weights), forms
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.x_shape, ctx.x_dtype, ctx.compute_dtype = x.shape, x.dtype, outputs[0].dtype
        ctx.low_dtype = next((one.dtype for one in p if one is not None), None)
        ctx.set_materialize_grads(False)
        # a view that is made in here could not be written in place, which models do with an output that nobody else has
        return tuple(torch.ops.aten._unsafe_view(one, one.shape) if one._is_view() else one for one in outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear cannot be differentiated twice: its gradient was asked for with create_graph=True; "
                "apply(model, linear=False)."
            )
        saved = ctx.saved_tensors  # once: a checkpoint gives each tensor out once
        weights, a, b, p = quarters(saved[: 4 * ctx.count])
        needs_x, *needed = ctx.needs_input_grad[FIRST - 1 :]
        given = {i: grad.reshape(-1, grad.shape[-1]) for i, grad in enumerate(grad_outputs) if grad is not None}
        needs = [[wanted and i in given for i, wanted in enumerate(part)] for part in quarters(needed)]
        x = None
        if any((*needs[0], *needs[2])):
            kept = saved[4 * ctx.count :]
            x = (kept[0] if ctx.source is None else ctx.source.again(kept)).reshape(-1, ctx.x_shape[-1])
        start, grads_a, grads_b = _low_rank_gradients(ctx, given, x, a, b, p, needs_x, needs)
        grad_x = None
        if needs_x and given:
            grad_x = ctx.module.grad_input(given, weights, ctx.x_dtype, start).view(ctx.x_shape)
        narrow = x.to(ctx.compute_dtype) if x is not None and any(needs[0]) else None
        grad_weights = [
            ctx.module.grad_weight(given[i], narrow).to(weights[i].dtype) if wanted else None
            for i, wanted in enumerate(needs[0])
        ]
        grad_biases = [given[i].sum(0).to(ctx.bias_dtypes[i]) if wanted else None for i, wanted in enumerate(needs[1])]
        return None, None, None, grad_x, *grad_weights, *grad_biases, *grads_a, *grads_b


def quarters(values: Sequence[Any]) -> list[Sequence[Any]]:
    """Of the weights, the biases, the A and the B."""
    size = len(values) // 4
    return [values[start : start + size] for start in range(0, 4 * size, size)] if size else [(), (), (), ()]


def _low_rank(
    low_rank: Any, x: torch.Tensor, biases: lora.Tensors, a: lora.Tensors, b: lora.Tensors, forms: lora.Forms
) -> tuple[list[torch.Tensor | None], dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """p of each adapter; what the linear's own GEMM adds to: the low-rank product and the bias; what dropout started from."""
    adapted = [i for i, form in enumerate(forms) if form is not None]
    if not adapted:
        return [None] * len(forms), {}, {}
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype is not torch.float64
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    low = dtype if autocast else a[adapted[0]].dtype  # type: ignore[union-attr]
    p, states = low_rank.project(x.reshape(-1, x.shape[-1]).to(low), lora.cast(a, low), forms)
    starts = {}
    for i, b_FR in zip(adapted, lora.cast([b[i] for i in adapted], low), strict=True):
        bias = biases[i]
        early = bias is not None and torch.promote_types(low, bias.dtype) is low  # else it would be rounded
        starts[i] = low_rank.product(p[i], b_FR, bias.to(low) if early else None, forms[i]).to(dtype)  # type: ignore[union-attr]
        if bias is not None and not early:
            starts[i] += bias
    return [p.get(i) for i in range(len(forms))], starts, states


def _low_rank_gradients(
    ctx: Any,
    given: dict[int, torch.Tensor],
    x: torch.Tensor | None,
    a: lora.Tensors,
    b: lora.Tensors,
    p: lora.Tensors,
    needs_x: bool,
    needs: list[list[bool]],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """The adapters' part of dx, or None; dA and dB of each."""
    forms, low, numbers, low_rank = ctx.forms, ctx.low_dtype, range(ctx.count), ctx.module.low_rank
    grads = {i: grad.to(low) for i, grad in given.items() if forms[i] is not None}
    if not grads:
        return None, [None] * ctx.count, [None] * ctx.count
    *_, needs_a, needs_b = needs
    grads_b = [low_rank.grad_b(grads[i], p[i], forms[i]).to(b[i].dtype) if needs_b[i] else None for i in numbers]  # type: ignore[union-attr]
    if not needs_x and not any(needs_a):
        return None, [None] * ctx.count, grads_b
    grad_p = low_rank.grad_projected(grads, lora.cast(b, low), forms)
    of_a = low_rank.grad_a(grad_p, x.to(low), forms, ctx.states) if any(needs_a) else {}  # type: ignore[union-attr]
    start = low_rank.grad_input(grad_p, lora.cast(a, low), forms, ctx.states) if needs_x else None
    return start, [of_a[i].to(a[i].dtype) if needs_a[i] else None for i in numbers], grads_b  # type: ignore[union-attr]
