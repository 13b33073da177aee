"""The definition of `fp8_linears`: every operand is rounded to 8 bits where it meets a product, and the products are exact."""

from collections.abc import Sequence
from typing import Any

import torch

from automodel_accel.kernels.fp8_linear.scaling import scale_of


def fp8_linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    rowwise: bool,
    e4m3: torch.dtype = torch.float8_e4m3fn,
    of_gradients: torch.dtype = torch.float8_e4m3fn,
) -> tuple[torch.Tensor, ...]:
    """[..., H], [F_i, H] each, [F_i] or None each, 8-bit formats of values and of gradients -> [..., F_i] each, in x's dtype."""
    joined = _Joined.apply(x, torch.cat(list(weights)), rowwise, e4m3, of_gradients)  # type: ignore[no-untyped-call]
    outputs = joined.split([weight.shape[0] for weight in weights], -1)
    return tuple(
        (output if bias is None else output + bias.to(output.dtype)).to(x.dtype)
        for output, bias in zip(outputs, biases, strict=True)
    )


def rounded(x: torch.Tensor, dtype: torch.dtype, dim: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The values that a cast stands for, and its scale: one for all, or along `dim` one for each slice; float64 where x is, else float32."""
    exact = torch.promote_types(x.dtype, torch.float32)
    x = x.float()
    amax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale, most = scale_of(amax, dtype), torch.finfo(dtype).max
    return ((x / scale).clamp(-most, most).to(dtype).float() * scale).to(exact), scale.to(exact)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_FH: torch.Tensor,
        rowwise: bool,
        e4m3: torch.dtype,
        of_gradients: torch.dtype,
    ) -> torch.Tensor:
        dim = 1 if rowwise else None
        x_NH, x_scale = rounded(x.reshape(-1, x.shape[-1]), e4m3, dim)
        w_FH, w_scale = rounded(weight_FH, e4m3, dim)
        ctx.save_for_backward(x_NH, x_scale, w_FH, w_scale)
        ctx.like, ctx.dim, ctx.of_gradients = (x.shape, x.dtype, weight_FH.dtype), dim, of_gradients
        return (x_NH @ w_FH.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x_NH, x_scale, w_FH, w_scale = ctx.saved_tensors
        g_NF = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        shape, x_dtype, weight_dtype = ctx.like
        if ctx.dim is None:
            g_NF, _ = rounded(g_NF, ctx.of_gradients, None)
            return (g_NF @ w_FH).view(shape).to(x_dtype), (g_NF.t() @ x_NH).to(weight_dtype), None, None, None
        of_input, _ = rounded(g_NF * w_scale.t(), ctx.of_gradients, 1)
        of_weight, _ = rounded(g_NF * x_scale, ctx.of_gradients, 0)
        grad_x = of_input @ (w_FH / w_scale)
        grad_weight = of_weight.t() @ (x_NH / x_scale)
        return grad_x.view(shape).to(x_dtype), grad_weight.to(weight_dtype), None, None, None
