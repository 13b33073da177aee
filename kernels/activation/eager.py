"""`activation` out of torch operations: any device, any dtype.

Shapes: all tensors are [N, F] with unit stride inside a row; rows may be strided.
"""

import torch

aten = torch.ops.aten


def forward(x_NF: torch.Tensor, name: str) -> torch.Tensor:
    """Return name(x), [N, F]."""
    return activate(x_NF, name, torch.empty(x_NF.shape, dtype=x_NF.dtype, device=x_NF.device))


def backward(grad_output_NF: torch.Tensor, kept_NF: torch.Tensor, name: str) -> torch.Tensor:
    """Return the gradient of x, [N, F], from x, or for relu from y."""
    return differentiate(grad_output_NF, kept_NF, name, torch.empty_like(grad_output_NF))


def activate(x: torch.Tensor, name: str, out: torch.Tensor) -> torch.Tensor:
    """Write name(x) into `out`, and return it."""
    if name == "silu":
        return aten.silu.out(x, out=out)  # type: ignore[no-any-return]
    if name == "relu":
        return torch.clamp_min(x, 0, out=out)
    if name == "relu2":
        return torch.square(torch.clamp_min(x, 0, out=out), out=out)
    if name == "quick_gelu":
        return torch.mul(x, 1.702, out=out).sigmoid_().mul_(x)
    return aten.gelu.out(x, approximate=_approximate(name), out=out)  # type: ignore[no-any-return]


def differentiate(grad: torch.Tensor, x: torch.Tensor, name: str, out: torch.Tensor) -> torch.Tensor:
    """Write grad * name'(x) into `out`, which may be `grad`, and return it."""
    if name == "silu":
        return aten.silu_backward.grad_input(grad, x, grad_input=out)  # type: ignore[no-any-return]
    if name == "relu":
        return aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)  # type: ignore[no-any-return]
    if name == "relu2":
        grad_of_square = torch.mul(grad, x).mul_(2)
        return aten.threshold_backward.grad_input(grad_of_square, x, 0, grad_input=out)  # type: ignore[no-any-return]
    if name == "quick_gelu":  # silu(1.702 x) / 1.702; float16 overflows at 1.702 x
        wide = torch.float32 if x.dtype == torch.float16 else x.dtype
        return out.copy_(aten.silu_backward(grad.to(wide), x.to(wide) * 1.702))
    return aten.gelu_backward.grad_input(grad, x, approximate=_approximate(name), grad_input=out)  # type: ignore[no-any-return]


def _approximate(name: str) -> str:
    return "tanh" if name == "gelu_tanh" else "none"
