"""`linears` with the adapters' part in Triton; the other products are torch's GEMMs (cuBLAS).

Forward, of linears of one input with frozen weights that have columns for B (kernels/lora/extension.py), from an input with room
beside its rows (kernels/room.py): one launch for all p, which copies B too, and one GEMM a linear. Backward: dW-like products of rank
size, one GEMM a linear for dx and dp together, one launch for all dA and one that adds the adapters' part to dx. No pass over an output
but the GEMM's own.
Without room beside x, and without columns beside the weight: the low-rank product is written first and the GEMM adds to it, as in eager.py.

Shapes: x is [N, H]; weights [F, H]; outputs and their gradients [N, F]; p and its gradient [N, C], see kernels/lora/fused.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from automodel_accel.kernels import room
from automodel_accel.kernels.launch import rows
from automodel_accel.kernels.linear import quarters
from automodel_accel.kernels.linear.eager import forward, grad_input, grad_weight, low_rank
from automodel_accel.kernels.lora import Adapter, fused
from automodel_accel.kernels.lora.extension import padded
from automodel_accel.kernels.lora.fused import Group, Placed
from automodel_accel.kernels.recompute import Source

__all__ = ["forward", "grad_input", "grad_weight", "low_rank", "together"]

Tensors = Sequence[torch.Tensor | None]
NO_SEED = 1 << 62 | 1  # of the type of a seed
COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
FIRST = 3  # of the weights among the inputs


def together(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Tensors,
    adapters: Sequence[Adapter | None],
    source: Source | None,
) -> tuple[torch.Tensor, ...] | None:
    """The outputs [..., F_i]; None where no linear is adapted, or adapters are computed in another dtype than the products."""
    found = [adapter for adapter in adapters if adapter is not None]
    dtype = _compute_dtype(x)
    if not found or not x.numel() or dtype not in COMPUTED:
        return None
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and any(adapter.a_RH.dtype is not dtype for adapter in found):
        return None
    a, b = [adapter and adapter.a_RH for adapter in adapters], [adapter and adapter.b_FR for adapter in adapters]
    how = [adapter and (adapter.form, adapter.extension) for adapter in adapters]
    return _Adapted.apply(source, how, x, *weights, *biases, *a, *b)  # type: ignore[no-any-return, no-untyped-call]


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Source | None, how: Sequence[Any], x: torch.Tensor, *rest: Any) -> Any:
        weights, biases, a, b = quarters(rest)
        dtype, count = _compute_dtype(x), len(weights)
        x_NH = rows(x if x.dtype is dtype else x.to(dtype))
        adapters = _adapters(how, a, b)
        group, columns = _placed(adapters, weights)
        wide = all(one.wide is not None for one in group)
        beside = wide and x.dtype is dtype and room.beside(x) >= columns
        seed = fused.draw_seed(x.device) if any(one.form.dropout for one in group) else NO_SEED
        p_NC = fused.project(x_NH, group, columns, seed, beside)  # and B beside the weights
        for adapter in adapters if wide else ():
            if adapter is not None and adapter.extension is not None:
                adapter.extension.filled = _content(adapter.b_FR)
        x_wide = room.extended(x, columns) if beside else None
        outputs = _products(x_NH, x_wide, p_NC, weights, biases, group)
        needs_weights, _, needs_a, needs_b = quarters(ctx.needs_input_grad[FIRST:])
        kept: tuple[torch.Tensor | None, ...] = (x,) if source is None else source.tensors
        kept = kept if any((*needs_weights, *needs_a)) else ()
        ctx.save_for_backward(*weights, *a, *b, p_NC if any(needs_b) else None, *kept)
        ctx.source, ctx.count, ctx.how, ctx.seed, ctx.columns = source, count, how, seed, columns
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.x_shape, ctx.x_dtype, ctx.dtype = x.shape, x.dtype, dtype
        ctx.set_materialize_grads(False)
        return tuple(output.view(*x.shape[:-1], output.shape[-1]) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear cannot be differentiated twice: its gradient was asked for with create_graph=True; "
                "apply(model, linear=False)."
            )
        saved, count = ctx.saved_tensors, ctx.count  # once: a checkpoint gives each tensor out once
        weights, a, b = (saved[start : start + count] for start in range(0, 3 * count, count))
        p_NC, *kept = saved[3 * count :]
        needs_x, *needed = ctx.needs_input_grad[FIRST - 1 :]
        given = {i: rows(grad) for i, grad in enumerate(grad_outputs) if grad is not None}
        needs = [[wanted and i in given for i, wanted in enumerate(part)] for part in quarters(needed)]
        x_NH = None
        if any((*needs[0], *needs[2])):
            x_NH = rows((kept[0] if ctx.source is None else ctx.source.again(tuple(kept))).to(ctx.dtype))
        adapters = _adapters(ctx.how, a, b)
        group = [one for one in _placed(adapters, weights)[0] if one.number in given]
        _refill(group, adapters)
        grads_b = {
            one.number: (given[one.number].t() @ _own(p_NC, one)).to(one.b_FR.dtype)
            for one in group
            if needs[3][one.number]
        }
        grad_x, grads_a = _through(ctx, given, weights, group, x_NH, needs_x, needs[2])
        grads_weights = {
            i: grad_weight(given[i], x_NH).to(weights[i].dtype) for i in given if needs[0][i] and x_NH is not None
        }
        grads_biases = {i: given[i].sum(0).to(ctx.bias_dtypes[i]) for i in given if needs[1][i]}
        grads = (grads_weights, grads_biases, grads_a, grads_b)
        return None, None, grad_x, *(of_kind.get(i) for of_kind in grads for i in range(count))


def _through(
    ctx: Any,
    given: Mapping[int, torch.Tensor],
    weights: Sequence[torch.Tensor],
    group: Group,
    x_NH: torch.Tensor | None,
    needs_x: bool,
    needs_a: Sequence[bool],
) -> tuple[torch.Tensor | None, dict[int, torch.Tensor]]:
    """dx, or None, and dA by number: what goes through dp."""
    wanted = [one for one in group if needs_a[one.number]]
    if not given or not (needs_x or wanted):
        return None, {}
    any_grad = next(iter(given.values()))
    n_rows, n_cols = any_grad.shape[0], ctx.x_shape[-1]
    if needs_x:
        both = any_grad.new_empty(n_rows, n_cols + ctx.columns)
        _grad_both(both, given, weights, group)
        dx_NH, dp_NC = both[:, :n_cols], both[:, n_cols:]
    else:
        dx_NH, dp_NC = None, any_grad.new_empty(n_rows, ctx.columns)
        for one in wanted:
            _grad_p(dp_NC, given[one.number], one)
    grads_a = fused.grad_a(x_NH, dp_NC, wanted, ctx.seed) if wanted else []  # type: ignore[arg-type]
    if dx_NH is not None:
        fused.add_grad_input(dx_NH, dp_NC, group, ctx.seed)
        dx_NH = dx_NH.view(ctx.x_shape).to(ctx.x_dtype)
    return dx_NH, {one.number: grad for one, grad in zip(wanted, grads_a, strict=True)}


def _products(
    x_NH: torch.Tensor,
    x_wide: torch.Tensor | None,
    p_NC: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Tensors,
    group: Group,
) -> list[torch.Tensor]:
    of, outputs = {one.number: one for one in group}, []
    for i, (weight, bias) in enumerate(zip(weights, _cast(biases, x_NH.dtype), strict=True)):
        one = of.get(i)
        if one is None:
            outputs.append(F.linear(x_NH, weight.to(x_NH.dtype), bias))
        elif x_wide is not None and one.wide is not None:
            outputs.append(F.linear(x_wide, one.wide, bias))
        else:
            b_RF = one.b_FR.to(x_NH.dtype).t()
            start = _own(p_NC, one) @ b_RF if bias is None else torch.addmm(bias, _own(p_NC, one), b_RF)
            outputs.append(start.addmm_(x_NH, weight.to(x_NH.dtype).t()))
    return outputs


def _grad_both(
    both: torch.Tensor, given: Mapping[int, torch.Tensor], weights: Sequence[torch.Tensor], group: Group
) -> None:
    """Write dx of the linears themselves and dp of the adapters, side by side: by one GEMM where the weights are so."""
    of = {one.number: one for one in group}
    n_cols, started = weights[0].shape[1], False
    for i in sorted(given, key=lambda i: i not in of or of[i].wide is None):
        one, grad = of.get(i), given[i]
        if one is not None and one.wide is not None:
            _accumulate(both, grad, one.wide, started)
        else:
            _accumulate(both[:, :n_cols], grad, weights[i].to(grad.dtype), started)
            if one is not None:
                _grad_p(both[:, n_cols:], grad, one)
        started = True


def _accumulate(out: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, started: bool) -> None:
    if started:
        out.addmm_(grad, weight)
    else:
        torch.mm(grad, weight, out=out)


def _grad_p(dp_NC: torch.Tensor, grad: torch.Tensor, one: Placed) -> None:
    torch.mm(grad, one.b_FR.to(grad.dtype), out=_own(dp_NC, one))


def _own(p_NC: torch.Tensor, one: Placed) -> torch.Tensor:
    return p_NC[:, one.start : one.start + one.rank]


def _adapters(how: Sequence[Any], a: Tensors, b: Tensors) -> list[Adapter | None]:
    return [one and Adapter(a[i], b[i], *one) for i, one in enumerate(how)]  # type: ignore[arg-type]


def _content(b_FR: torch.Tensor) -> tuple[int, int]:
    return b_FR.data_ptr(), b_FR._version


def _refill(group: Group, adapters: Sequence[Adapter | None]) -> None:
    """Copy B beside the weights again where another adapter was active in a forward since."""
    for one in group:
        extension = adapters[one.number].extension  # type: ignore[union-attr]
        if one.wide is not None and extension is not None and extension.filled != _content(one.b_FR):
            first = one.wide.shape[1] - extension.columns + one.start
            one.wide[:, first : first + one.rank] = one.b_FR
            extension.filled = _content(one.b_FR)


def _placed(adapters: Sequence[Adapter | None], weights: Sequence[torch.Tensor]) -> tuple[list[Placed], int]:
    """The adapters, each in columns of its own, and how many these are.

    With columns beside their weights: those, where the adapters of the call are all that share them.
    """
    found = [(i, adapter) for i, adapter in enumerate(adapters) if adapter is not None]
    widths = [padded(adapter.a_RH.shape[0]) for _, adapter in found]
    columns = sum(widths)
    wide = {i: _wide(adapter, weights[i], columns) for i, adapter in found}
    if all(one is not None for one in wide.values()):
        starts = [adapter.extension.start for _, adapter in found]  # type: ignore[union-attr]
        spans = sorted(zip(starts, widths, strict=True))
        fit = all(start == sum(width for _, width in spans[:k]) for k, (start, _) in enumerate(spans))
    else:
        fit = False
    if not fit:
        wide, starts = {}, [sum(widths[:k]) for k in range(len(widths))]
    placed = [
        Placed(i, lot, adapter.a_RH.contiguous(), adapter.b_FR.contiguous(), adapter.form, start, wide.get(i))
        for lot, ((i, adapter), start) in enumerate(zip(found, starts, strict=True))
    ]
    return placed, columns


def _wide(adapter: Adapter, weight: torch.Tensor, columns: int) -> torch.Tensor | None:
    extension = adapter.extension
    if extension is None or extension.columns != columns or weight.requires_grad:
        return None
    return extension.wide(weight)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype is not torch.float64
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def _cast(tensors: Tensors, dtype: torch.dtype) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]
