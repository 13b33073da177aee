"""Collectives that gradients go through: what a sum over ranks, a copy on all ranks and a gather are to autograd.

Each forward has the backward that makes the loss of every rank the same function of the same whole values, so that gradients
need no factor: what is copied to all ranks gets the sum of their gradients, what is summed passes its gradient on. Source:
Shoeybi et al., "Megatron-LM", 2019, section 3; Korthikanti et al., "Reducing Activation Recomputation", 2022 (sequences).
A group of None, or of one rank, does nothing.
"""

from typing import Any

import torch
import torch.distributed as dist

Group = Any  # torch.distributed.ProcessGroup, or None
_REDUCE_SCATTER = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)  # its name until torch 2.12


def size_of(group: Group) -> int:
    """The number of ranks."""
    return 1 if group is None else dist.get_world_size(group)


def copy_to(x: torch.Tensor, group: Group) -> torch.Tensor:
    """`x`, which is the same on all ranks, as the input of what each rank computes its part of; its gradient is their sum."""
    if size_of(group) == 1 or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    return _Copy.apply(x, group)  # type: ignore[no-untyped-call, no-any-return]


def sum_from(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of `x` over the ranks, on all of them."""
    return x if size_of(group) == 1 else _Sum.apply(x, group)  # type: ignore[no-untyped-call]


def gather_from(x: torch.Tensor, group: Group, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """The parts `x` of all ranks along `dim`, on all of them, where what follows is the same on all ranks.

    Args:
        x: This rank's part.
        group: The ranks, in the order of their parts.
        dim: Along which the parts lie.
        sizes: Of each rank's part along `dim`; None where all are equal.
    """
    return x if size_of(group) == 1 else _Gather.apply(x, group, dim, sizes, False)  # type: ignore[no-untyped-call]


def gather_to(x: torch.Tensor, group: Group, dim: int, sizes: list[int] | None = None) -> torch.Tensor:
    """As `gather_from`, where each rank then computes its own part of what follows: the gradients of the ranks are summed."""
    return x if size_of(group) == 1 else _Gather.apply(x, group, dim, sizes, True)  # type: ignore[no-untyped-call]


def split_to(x: torch.Tensor, group: Group, dim: int, sizes: list[int] | None = None) -> torch.Tensor:
    """This rank's part of `x`, which is the same on all ranks; the gradient is gathered from all parts."""
    return x if size_of(group) == 1 else _Split.apply(x, group, dim, sizes)  # type: ignore[no-untyped-call]


def sum_split_from(x: torch.Tensor, group: Group, dim: int, sizes: list[int] | None = None) -> torch.Tensor:
    """This rank's part of the sum of `x` over the ranks."""
    return x if size_of(group) == 1 else _SumSplit.apply(x, group, dim, sizes)  # type: ignore[no-untyped-call]


def part_sizes(length: int, parts: int) -> list[int]:
    """How torch.chunk, and so DTensor, cuts a length: full parts first, the last ones shorter, or empty."""
    full = -(-length // parts)
    return [max(0, min(full, length - full * number)) for number in range(parts)]


def _all_reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _all_gather(x: torch.Tensor, group: Group, dim: int, sizes: list[int] | None) -> torch.Tensor:
    sizes = sizes or [x.shape[dim]] * size_of(group)
    most = max(sizes)
    # gloo and NCCL gather equal parts only
    part = x.movedim(dim, 0)
    sent = part.new_zeros(most, *part.shape[1:])
    sent[: part.shape[0]] = part
    received = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(received, sent, group=group)
    parts = [tensor[:size] for tensor, size in zip(received, sizes, strict=True)]
    return torch.cat(parts).movedim(0, dim).contiguous()


def _sum_part(x: torch.Tensor, group: Group, dim: int, sizes: list[int]) -> torch.Tensor:
    """This rank's part of the sum of `x`: half the traffic of the whole sum."""
    if len(set(sizes)) > 1:  # neither gloo nor NCCL scatters uneven parts
        return _own_part(_all_reduce(x, group), group, dim, sizes)
    whole = x.movedim(dim, 0).contiguous()
    part = whole.new_empty(sizes[0], *whole.shape[1:])
    _REDUCE_SCATTER(part, whole, group=group)
    return part.movedim(0, dim).contiguous()


def _own_part(x: torch.Tensor, group: Group, dim: int, sizes: list[int] | None) -> torch.Tensor:
    sizes = sizes or part_sizes(x.shape[dim], size_of(group))
    rank = dist.get_rank(group)
    return x.narrow(dim, sum(sizes[:rank]), sizes[rank]).contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        return _all_reduce(grad_output, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        return grad_output, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: Group, dim: int, sizes: list[int] | None, summed: bool
    ) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.summed = group, dim, summed
        ctx.sizes = sizes or [x.shape[dim]] * size_of(group)
        return _all_gather(x, group, dim, ctx.sizes)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        part = _sum_part if ctx.summed else _own_part
        return part(grad_output, ctx.group, ctx.dim, ctx.sizes), None, None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int, sizes: list[int] | None) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes or part_sizes(x.shape[dim], size_of(group))
        return _own_part(x, group, dim, ctx.sizes)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        return _all_gather(grad_output, ctx.group, ctx.dim, ctx.sizes), None, None, None


class _SumSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int, sizes: list[int] | None) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes or part_sizes(x.shape[dim], size_of(group))
        return _sum_part(x, group, dim, ctx.sizes)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        return _all_gather(grad_output, ctx.group, ctx.dim, ctx.sizes), None, None, None
