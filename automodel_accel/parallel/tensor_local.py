"""Parameters that lie cut over the tensor ranks, and are plain local tensors while a module computes with them.

At rest every parameter is a DTensor on the tensor axis, so that optimizers, clipping, checkpoints and FSDP2 see what torch made for
it. While a unit (an attention, an MLP, experts) runs, its modules hold this rank's parts as plain tensors that gradients go
through, so that every fused kernel computes with its part as with a whole. What enters a unit is the same on all ranks and passes
`copy_to`, what leaves it is a share and passes `sum_from`: one all-reduce in forward and one in backward. A parameter that is
whole inside of a unit serves this rank's part only, so its gradient is a share as well, and passes `copy_to`.
Source: Shoeybi et al., "Megatron-LM", 2019, section 3.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.utils._pytree import tree_map

from automodel_accel.kernels.collectives import copy_to, part_sizes, sum_from
from automodel_accel.kernels.recompute import carry
from automodel_accel.patches.retype import owner_of, retype

WHOLE, SHARE, ONCE = "whole", "share", "once"


@dataclass(frozen=True, slots=True)
class Held:
    """One parameter while a module runs.

    Attributes:
        module: The module that has it.
        name: Its name there.
        serves: WHOLE: what is computed with it is the same on all ranks. SHARE: it serves this rank's part. ONCE: likewise, and it is
            added to a sum over ranks, so that it counts on the first one only.
    """

    module: nn.Module
    name: str
    serves: str


def packed(dim: int, parts: int = 2) -> Placement:
    """Each rank holds its part of each of the `parts` that lie behind one another: gate and up."""
    return _StridedShard(dim, split_factor=parts)


def own_part(tensor: torch.Tensor, placement: Placement, rank: int, size: int) -> torch.Tensor:
    """What a rank holds of a whole tensor: a copy."""
    if isinstance(placement, _StridedShard):
        parts = tensor.chunk(int(placement.split_factor), placement.dim)
        return torch.cat([own_part(part, Shard(placement.dim), rank, size) for part in parts], placement.dim)
    if not isinstance(placement, Shard):
        return tensor.clone()
    sizes = part_sizes(tensor.shape[placement.dim], size)
    return tensor.narrow(placement.dim, sum(sizes[:rank]), sizes[rank]).clone(memory_format=torch.contiguous_format)


def put_at_rest(model: nn.Module, mesh: DeviceMesh, cuts: Mapping[nn.Parameter, Placement]) -> None:
    """Replace every parameter by a DTensor on `mesh`, which has one axis; those that are not in `cuts` are whole on each rank."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay one
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter not in made:
                made[parameter] = _at_rest(parameter, mesh, cuts.get(parameter, Replicate()))
            module._parameters[name] = made[parameter]


def _at_rest(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    local = own_part(parameter.detach(), placement, mesh.get_local_rank(), mesh.size())
    shape, stride = parameter.shape, torch.empty(parameter.shape, device="meta").stride()
    spread = DTensor.from_local(local, mesh, (placement,), run_check=False, shape=shape, stride=stride)
    fresh = nn.Parameter(spread, requires_grad=parameter.requires_grad)
    vars(fresh).update(vars(parameter))
    return fresh


@contextmanager
def held(parameters: Sequence[Held], group: Any, rank: int) -> Iterator[None]:
    """Inside, the modules hold plain tensors; those that do already, because a module around them runs, keep them."""
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for one in parameters:
            parameter = one.module._parameters[one.name]
            if isinstance(parameter, DTensor):
                before.append((one.module, one.name, parameter))
                one.module._parameters[one.name] = _local(parameter, one.serves, group, rank)
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def _local(parameter: Any, serves: str, group: Any, rank: int) -> torch.Tensor:
    local: torch.Tensor = parameter.to_local()
    if serves == WHOLE or not parameter.placements[-1].is_replicate():
        return local
    local = copy_to(local, group)
    return local * float(rank == 0) if serves == ONCE else local


class Copied:
    """How tensors pass into a unit and out of it where all ranks hold all tokens between units."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def enter(self, args: Any, kwargs: Any) -> Any:
        """What a unit is given: the same on all ranks, used by each for its part."""
        entered: dict[int, torch.Tensor] = {}  # by the tensor: what shares an input goes on sharing it

        def copied(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                return x
            return entered.setdefault(id(x), carry(x, copy_to(x, self.group)))

        return tree_map(copied, (args, kwargs))

    def leave(self, share: torch.Tensor) -> torch.Tensor:
        """The sum of what the ranks' units give."""
        return sum_from(share, self.group)


def serve_unit(unit: nn.Module, parameters: Sequence[Held], passage: Copied, rank: int) -> None:
    """Re-type a unit: it computes this rank's share, and gives the sum."""
    original = type(unit).forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = passage.enter(args, kwargs)
        with held(parameters, passage.group, rank):
            output = original(self, *args, **kwargs)
        return (passage.leave(output[0]), *output[1:]) if isinstance(output, tuple) else passage.leave(output)

    retype(unit, {"forward": forward}, owner_of(unit))


def serve_whole(module: nn.Module, parameters: Sequence[Held], group: Any, rank: int) -> None:
    """Re-type a module that computes the same on all ranks: it has plain tensors while it runs."""
    original = type(module).forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with held(parameters, group, rank):
            return original(self, *args, **kwargs)

    retype(module, {"forward": forward}, owner_of(module))


def placement(parameter: nn.Parameter) -> Shard | None:
    """Along which dimension FSDP2 cuts a parameter: the first; or another one where that is cut unevenly or packed already."""
    spread: Any = parameter
    if not isinstance(spread, DTensor):
        return None
    cut_at: Any = spread.placements[0]
    is_packed = isinstance(cut_at, _StridedShard)
    if cut_at.is_replicate() or cut_at.dim != 0 or spread.dim() == 1:
        return None
    uneven = spread.shape[0] % spread.device_mesh.size() != 0
    return Shard(1) if is_packed or uneven else None
