"""Low-rank adapters beside products that somebody else computed, such as a library's of its own quantised weights.

    p_i = (m_i * x) A_i^T                y_i = base_i + f_i p_i B_i^T                            i: each linear of one input x
    dbase_i = dy_i                       dB_i = f_i dy_i^T p_i
    dp_i = f_i dy_i B_i                  dA_i = dp_i^T (m_i * x)            dx = sum over i of m_i * (dp_i A_i)

with p, f and the masks m of kernels/lora; dx is the adapters' part of the input's gradient, to which autograd adds that of the
products. One node of autograd for all adapters of one input: they share the cast of x, the GEMMs with A and the sum in dx.

Bytes, beyond x, p, A and B: where base and adapters have one dtype the GEMM with B reads and writes the output once, in the base's
memory where that is the caller's to give. Adapters of another dtype cost a product in that dtype, [N, F], written and read once.

Saved for backward: p, A, B, and x or its source (kernels/recompute.py); neither a mask nor a dropped or cast x. Source: Dettmers et
al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from automodel_accel.kernels import lora
from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_torch
from automodel_accel.kernels.lora import Adapter, reference
from automodel_accel.kernels.recompute import Source

KERNEL = Kernel(
    name="lora_beside",
    reference=reference.beside,  # type: ignore[arg-type]  # several outputs
    implementations=(in_torch("automodel_accel.kernels.lora.eager"),),
)
FIRST = 4  # of the products among the inputs; x stands before them


def beside(
    x: torch.Tensor,
    bases: Sequence[torch.Tensor],
    adapters: Sequence[Adapter],
    *,
    given_away: bool = False,
    source: Source | None = None,
    implementation: str = AUTO,
) -> tuple[torch.Tensor, ...]:
    """Each product plus what its adapter adds, in the product's dtype; the adapters obey autocast as `F.linear` does.

    Args:
        x: [..., H], any floating point dtype.
        bases: [..., F_i] each: products of x, of any floating point dtype.
        adapters: One for each; all in one dtype, in which they are computed (in autocast's, where that is on).
        given_away: Whether the bases are nobody else's, so that their memory may become that of the outputs. A view, and a leaf
            that needs a gradient, is copied all the same: autograd does not allow a write there.
        source: What x was computed from, to be saved in its place; see `source_of`.
        implementation: "auto" or "torch".

    Returns:
        [..., F_i] for each product, in its dtype.

    Raises:
        ValueError: there is not one adapter for each product, a shape does not fit, or the implementation cannot serve the call.
    """
    if len(bases) != len(adapters):
        raise ValueError(f"beside: {len(bases)} products and {len(adapters)} adapters; expected one for each.")
    for base, adapter in zip(bases, adapters, strict=True):
        _check(x, base, adapter)
    implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation)
    forms = tuple(adapter.form for adapter in adapters)
    pairs = ([adapter.a_RH for adapter in adapters], [adapter.b_FR for adapter in adapters])
    return _Beside.apply(source, (implementation, given_away), forms, x, *bases, *pairs[0], *pairs[1])  # type: ignore[no-any-return, no-untyped-call]


def _check(x: torch.Tensor, base: torch.Tensor, adapter: Adapter) -> None:
    if base.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"beside: a product is {tuple(base.shape)}, expected {(*x.shape[:-1], 'F')} for that x.")
    like = torch.empty(base.shape[-1], x.shape[-1], device="meta")
    if problem := adapter.misfit(like):
        raise ValueError(f"beside: {problem}.")


class _Beside(torch.autograd.Function):
    """Not a registered operation: how many outputs it has varies, and torch.compile takes PEFT's own forward."""

    @staticmethod
    def forward(
        ctx: Any, source: Source | None, how: tuple[str, bool], forms: Sequence[lora.Form], x: torch.Tensor, *rest: Any
    ) -> Any:
        bases, a, b = _thirds(rest)
        implementation, given_away = how
        ctx.module = implementation_module(KERNEL, x.device.type, x.dtype, x.shape[-1], implementation)
        low = _compute_dtype(x, a[0])
        rows = x.reshape(-1, x.shape[-1]).to(low)
        p, ctx.states = ctx.module.project(rows, lora.cast(a, low), forms)
        outputs = [base if given_away and _may_write(base) else base.clone() for base in bases]
        ctx.mark_dirty(*(output for output, base in zip(outputs, bases, strict=True) if output is base))
        for i, b_FR in enumerate(lora.cast(b, low)):
            _add(ctx.module, outputs[i], p[i], b_FR, forms[i])  # type: ignore[arg-type]
        _, needs_a, _ = _thirds(ctx.needs_input_grad[FIRST:])
        kept = () if not any(needs_a) else (x,) if source is None else source.tensors
        ctx.save_for_backward(*a, *b, *(p[i] for i in range(len(forms))), *kept)
        ctx.source, ctx.forms, ctx.count, ctx.low = source, forms, len(bases), low
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "lora_beside cannot be differentiated twice: its gradient was asked for with create_graph=True; "
                "apply(model, quantised=False)."
            )
        saved = ctx.saved_tensors  # once: a checkpoint gives each tensor out once
        a, b, p = _thirds(saved[: 3 * ctx.count])
        kept = saved[3 * ctx.count :]
        needs_x, *needed = ctx.needs_input_grad[FIRST - 1 :]
        needs_base, needs_a, needs_b = _thirds(needed)
        given = {
            i: grad.reshape(-1, grad.shape[-1]).to(ctx.low) for i, grad in enumerate(grad_outputs) if grad is not None
        }
        module, forms, numbers = ctx.module, ctx.forms, range(ctx.count)
        grads_b = {i: module.grad_b(given[i], p[i], forms[i]) for i in given if needs_b[i]}
        grad_x, grads_a = None, {}
        if given and (needs_x or any(needs_a)):
            grad_p = module.grad_projected(given, lora.cast(b, ctx.low), forms)
            if any(needs_a):
                x = kept[0] if ctx.source is None else ctx.source.again(kept)
                grads_a = module.grad_a(grad_p, x.reshape(-1, ctx.x_shape[-1]).to(ctx.low), forms, ctx.states)
            if needs_x:
                grad_x = module.grad_input(grad_p, lora.cast(a, ctx.low), forms, ctx.states)
                grad_x = grad_x.to(ctx.x_dtype).view(ctx.x_shape)
        return (
            *(None, None, None, grad_x),
            *(grad_outputs[i] if needs_base[i] else None for i in numbers),
            *_in_dtypes(grads_a, a, needs_a),
            *_in_dtypes(grads_b, b, needs_b),
        )


def _thirds(values: Sequence[Any]) -> list[Sequence[Any]]:
    """Of the products, the A and the B; or of the A, the B and the p."""
    size = len(values) // 3
    return [values[:size], values[size : 2 * size], values[2 * size :]]


def _compute_dtype(x: torch.Tensor, a: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype is not torch.float64
    return torch.get_autocast_dtype(kind) if autocast else a.dtype


def _may_write(base: torch.Tensor) -> bool:
    """Whether autograd lets the product's memory be written to, and a GEMM finds its rows there."""
    return not base._is_view() and base.is_contiguous() and not (base.is_leaf and base.requires_grad)


def _add(module: Any, output: torch.Tensor, p_NR: torch.Tensor, b_FR: torch.Tensor, form: lora.Form) -> None:
    rows = output.view(-1, output.shape[-1])
    if rows.dtype is p_NR.dtype:
        rows.addmm_(p_NR, b_FR.t(), alpha=form.factor)
    else:
        rows += module.product(p_NR, b_FR, None, form)


def _in_dtypes(
    grads: Mapping[int, torch.Tensor], tensors: Sequence[torch.Tensor], needs: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Of each tensor that needs a gradient and has one, in its dtype."""
    return [grads[i].to(tensor.dtype) if needs[i] and i in grads else None for i, tensor in enumerate(tensors)]
