"""`linears` by torch's GEMMs: any device, any dtype.

Shapes: x is [N, H] (in forward [..., H]); weights [F_i, H]; gradients of the outputs [N, F_i].
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from automodel_accel.kernels.lora import eager as low_rank

__all__ = ["forward", "grad_input", "grad_weight", "low_rank", "together"]


def together(*call: object) -> None:
    """There is no kernel for the adapters and the products together."""


def forward(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    starts: Mapping[int, torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """[..., F_i] each; where there is a start [N, F_i], the GEMM adds to it, in its memory, and so does whoever made it the bias."""
    return tuple(
        F.linear(x, weight, bias) if i not in starts else _added(starts[i], x, weight)
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True))
    )


def _added(start_NF: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).to(start_NF.dtype)
    return start_NF.addmm_(rows, weight.to(start_NF.dtype).t()).view(*x.shape[:-1], weight.shape[0])


def grad_input(
    grad_outputs: Mapping[int, torch.Tensor],
    weights: Sequence[torch.Tensor],
    dtype: torch.dtype,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx [N, H] in `dtype`, of the outputs that have a gradient, by their number; added to `start`, in its memory.

    The GEMMs add to one another's result; under autocast a wider x takes the sum of products in its own dtype, as autograd does.
    """
    others = list(grad_outputs.items())
    if start is None:
        first, grad = others.pop(0)
        start = grad @ weights[first].to(grad.dtype)
    grad_x = start.to(dtype)
    for i, grad in others:
        if dtype == grad.dtype:
            grad_x.addmm_(grad, weights[i].to(grad.dtype))
        else:
            grad_x += grad @ weights[i].to(grad.dtype)
    return grad_x


def grad_weight(grad_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dW [F, H]."""
    return grad_output.t() @ x
