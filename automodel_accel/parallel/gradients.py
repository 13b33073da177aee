"""Gradients of a model that is spread: clipped by the norm of all of them, summed over ranks once a step."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

SYNC, LAST = "set_requires_gradient_sync", "set_is_last_backward"  # of FSDP2; the first of replicate too
MEGATRON_SYNC = "set_model_auto_sync"


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
) -> torch.Tensor:
    """Scale gradients such that the norm of all of them together is at most `max_norm`, as torch's function of that name.

    Unlike torch's it takes parameters on different meshes, and plain ones, at once: one norm of all tensors of a dtype, one
    all-reduce of one number, one scaling, and no wait of the host for the device (but where gradients are offloaded to the host).

    Args:
        parameters: A model, or some of its parameters: DTensors, cut or copied along any axis, or plain tensors, which are the same
            on all ranks.
        max_norm: In the unit of the gradients.
        norm_type: Which norm: 2.0, another power, or infinity.

    Returns:
        The norm before, a float32 scalar on the device, the same on all ranks.

    Raises:
        ValueError: a gradient that ranks have not summed up yet.
    """
    found = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    grads = [parameter.grad for parameter in found if parameter.grad is not None]
    groups: dict[tuple[torch.device, torch.dtype, int], list[torch.Tensor]] = defaultdict(list)
    for grad in grads:
        local: torch.Tensor = grad.to_local() if isinstance(grad, DTensor) else grad
        groups[local.device, local.dtype, _copies(grad)].append(local)
    norm = _norm(groups, norm_type, _device(grads))
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for (device, _, _), tensors in groups.items():
        torch._foreach_mul_(tensors, factor.to(device, non_blocking=True))
    return norm


@contextmanager
def accumulate(model: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of one micro-batch: ranks sum gradients up only in the last one of a step.

    Until then each rank holds gradients of all parameters, uncut. A model that is not spread is left alone.
    """
    wrapped = [m for m in model.modules() if hasattr(type(m), SYNC) or hasattr(type(m), MEGATRON_SYNC)]
    try:
        _sync(wrapped, last)
        yield
    finally:
        _sync(wrapped, True)


def _sync(wrapped: Iterable[Any], on: bool) -> None:
    for module in wrapped:
        if hasattr(type(module), MEGATRON_SYNC):
            module.set_model_auto_sync(on)
        elif hasattr(type(module), LAST):
            module.set_requires_gradient_sync(on, recurse=False)
            module.set_is_last_backward(on)
        else:
            module.set_requires_gradient_sync(on)


def _copies(grad: torch.Tensor) -> int:
    """How many ranks hold the same numbers as this one."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(grad, DTensor):
        return world
    if any(placement.is_partial() for placement in grad.placements):
        raise ValueError(
            f"a gradient lies as {grad.placements}: it is not summed up over its mesh yet; clip after backward."
        )
    parts = 1
    for size, placement in zip(grad.device_mesh.shape, grad.placements, strict=True):
        parts *= 1 if placement.is_replicate() else size
    return world // parts


def _norm(
    groups: dict[tuple[torch.device, torch.dtype, int], list[torch.Tensor]], power: float, device: torch.device
) -> torch.Tensor:
    """Each rank adds its share of what several ranks hold, so that one sum over all ranks is right for all meshes."""
    most = power == float("inf")
    total = torch.zeros((), dtype=torch.float32, device=device)
    for (_, _, copies), tensors in groups.items():
        if full := [tensor for tensor in tensors if tensor.numel()]:  # a short dimension leaves ranks without a part
            norms = torch.stack(torch._foreach_norm(full, power, dtype=torch.float32)).to(device, non_blocking=True)
            total = torch.maximum(total, norms.max()) if most else total + norms.pow(power).sum() / copies
    if dist.is_initialized():
        dist.all_reduce(total, dist.ReduceOp.MAX if most else dist.ReduceOp.SUM)
    return total if most else total.pow(1 / power)


def _device(grads: list[torch.Tensor]) -> torch.device:
    """On which the ranks can sum up: that of the mesh, where gradients may be on the host."""
    for grad in grads:
        if isinstance(grad, DTensor) and grad.device_mesh.device_type != "cpu":
            return torch.device(grad.device_mesh.device_type, torch.accelerator.current_device_index())
    return grads[0].device if grads else torch.device("cpu")
