"""linears: several linears of one input, in one node of autograd.

    y_i = x W_i^T + b_i            dx = sum over i of dy_i W_i          dW_i = dy_i^T x          db_i = sum over rows of dy_i

The GEMMs are torch's (cuBLAS), 2 N H sum(F_i) FLOPs forward and twice that backward. What one node saves: dx is accumulated by
the GEMMs themselves (beta = 1, in float32 before each rounding), where autograd adds the inputs' gradients in kernels of their
own: 3 passes over [N, H] for each linear beyond the first. And the input need not be kept: with a `Source` (kernels/recompute.py)
its source is saved, and x is computed again once for all of them. Source: Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", 2022.

Saved for backward: x or its source, and the weights; x only where a weight has a gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch

from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_torch
from automodel_accel.kernels.linear import reference
from automodel_accel.kernels.recompute import Source

KERNEL = Kernel(
    name="linear",
    reference=reference.linears,  # type: ignore[arg-type]  # several outputs
    implementations=(in_torch("automodel_accel.kernels.linear.eager"),),
)


def linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    source: Source | None = None,
    implementation: str = AUTO,
) -> tuple[torch.Tensor, ...]:
    """`F.linear(x, weight, bias)` for each weight; obeys autocast as that does.

    Args:
        x: [..., H], any floating point dtype.
        weights: [F_i, H] each, in one dtype.
        biases: [F_i] each, or None.
        source: What x was computed from, to be saved in its place; see `source_of`.
        implementation: "auto" or "torch".

    Returns:
        [..., F_i] for each weight.

    Raises:
        ValueError: a weight's shape does not fit, there is not one bias (or None) for each weight, or the implementation
            cannot serve the call.
    """
    if len(weights) != len(biases):
        raise ValueError(f"linears: {len(weights)} weights and {len(biases)} biases; expected one (or None) for each.")
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"linears: a weight has shape {tuple(weight.shape)}, expected [F, {x.shape[-1]}] for x {tuple(x.shape)}."
            )
    implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation)
    return _Linears.apply(source, implementation, x, *weights, *biases)  # type: ignore[no-any-return, no-untyped-call]


class _Linears(torch.autograd.Function):
    """Not a registered operation: how many outputs it has varies, and torch.compile takes the plain linears."""

    @staticmethod
    def forward(ctx: Any, source: Source | None, implementation: str, x: torch.Tensor, *rest: Any) -> Any:
        weights, biases = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        module = implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation)
        outputs = module.forward(x, weights, biases)
        needs_weights = ctx.needs_input_grad[3 : 3 + len(weights)]
        kept: tuple[torch.Tensor | None, ...] = (x,) if source is None else source.tensors
        kept = kept if any(needs_weights) else ()
        ctx.save_for_backward(*weights, *kept)
        ctx.source, ctx.module, ctx.count = source, module, len(weights)
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.x_shape, ctx.x_dtype, ctx.compute_dtype = x.shape, x.dtype, outputs[0].dtype
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear cannot be differentiated twice: its gradient was asked for with create_graph=True; "
                "apply(model, linear=False)."
            )
        saved = ctx.saved_tensors  # once: a checkpoint gives each tensor out once
        weights, kept = saved[: ctx.count], saved[ctx.count :]
        _, _, needs_x, *needs = ctx.needs_input_grad
        needs = [
            wanted and grad is not None for wanted, grad in zip(needs, (*grad_outputs, *grad_outputs), strict=True)
        ]
        x = None
        if any(needs[: ctx.count]):
            x = kept[0] if ctx.source is None else ctx.source.again(kept)
            x = x.to(ctx.compute_dtype).reshape(-1, ctx.x_shape[-1])
        given = [(i, grad) for i, grad in enumerate(grad_outputs) if grad is not None]
        grads_2d = {i: grad.reshape(-1, grad.shape[-1]) for i, grad in given}
        grad_x = ctx.module.grad_input(grads_2d, weights, ctx.x_dtype).view(ctx.x_shape) if needs_x and given else None
        grad_weights = [
            ctx.module.grad_weight(grads_2d[i], x).to(weights[i].dtype) if needs[i] else None for i in range(ctx.count)
        ]
        grad_biases = [
            grads_2d[i].sum(0).to(dtype) if needs[ctx.count + i] else None for i, dtype in enumerate(ctx.bias_dtypes)
        ]
        return None, None, grad_x, *grad_weights, *grad_biases
