"""`linears` by torch's GEMMs: any device, any dtype.

Shapes: x is [N, H]; weights [F_i, H]; gradients of the outputs [N, F_i].
"""

from collections.abc import Mapping, Sequence

import torch

from automodel_accel.kernels.linear import reference

forward = reference.linears


def grad_input(
    grad_outputs: Mapping[int, torch.Tensor], weights: Sequence[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """dx [N, H] in `dtype`, of the outputs that have a gradient, by their number.

    The GEMMs add to one another's result; under autocast a wider x takes the sum of products in its own dtype, as autograd does.
    """
    (first, grad), *others = grad_outputs.items()
    grad_x = (grad @ weights[first].to(grad.dtype)).to(dtype)
    for i, grad in others:
        if dtype == grad.dtype:
            grad_x.addmm_(grad, weights[i].to(grad.dtype))
        else:
            grad_x += grad @ weights[i].to(grad.dtype)
    return grad_x


def grad_weight(grad_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dW [F, H]."""
    return grad_output.t() @ x
