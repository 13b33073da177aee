"""rms_norm that hands its input on, so that the gradients of both meet in its own backward kernel.

    y = rms_norm(x)         h = x                  dx = dh + (dx of the norm)

A layer uses its input twice: the norm takes it, and the residual sum behind it. Autograd would add the two gradients in a kernel
of its own, 3 passes over [N, H]; here it is 1 more read in a kernel that runs anyway. Outside of torch.compile, which fuses that.
Saved for backward: as for rms_norm. Source: as for add_rms_norm, of which it is the backward.
"""

from typing import Any

import torch

from automodel_accel.kernels import rms_norm as package
from automodel_accel.kernels.contract import AUTO


def rms_norm_through(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    order: str = "cast_then_mul",
    implementation: str = AUTO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the last dimension of `x`, and return it beside the result.

    Args:
        x: [..., H]; this and the others as for `rms_norm`.
        weight: [H] or None.
        eps: Added to the mean square.
        offset: Added to the weight.
        order: Where the result is rounded.
        implementation: "auto", "triton" or "torch".

    Returns:
        (y, h): y = rms_norm(x), and h, a view of x; what is added to h's gradient reaches x in one kernel with y's.

    Raises:
        ValueError: as for `rms_norm`.
    """
    package._check(x, weight, order)
    return _Through.apply(x, weight, eps, offset, order, implementation)  # type: ignore[no-any-return, no-untyped-call]


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float,
        order: str,
        implementation: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, rstd = package._forward(x, weight, eps, offset, order, implementation)
        ctx.save_for_backward(x, weight, rstd)
        ctx.options = offset, order, implementation
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "rms_norm cannot be differentiated twice: its gradient was asked for with create_graph=True."
            )
        grad_y, grad_h = grad_outputs
        if grad_y is None:
            return grad_h, None, None, None, None, None
        x, weight, rstd = ctx.saved_tensors
        offset, order, implementation = ctx.options
        needs_grad_weight = weight is not None and ctx.needs_input_grad[1]
        if grad_h is None:
            grad_x, grad_weight = package._backward(
                grad_y, x, weight, rstd, offset, order, implementation, needs_grad_weight
            )
        else:
            grad_x, _, grad_weight = package._add_backward(
                *(grad_y, grad_h, x, weight, rstd, offset, order, 1.0, x.dtype, x.dtype),
                *(implementation, needs_grad_weight),
            )
        return grad_x, grad_weight if needs_grad_weight else None, None, None, None, None
