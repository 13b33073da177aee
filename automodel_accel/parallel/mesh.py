"""Mesh: how the processes of a run are laid out, and Ranks: that layout with the running processes behind it."""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from automodel_accel.kernels.contract import unknown_name
from automodel_accel.kernels.facts import this_machine
from automodel_accel.parallel.presence import assemble

AXES = ("replicate", "shard", "context", "tensor")  # the last one varies fastest: its ranks are neighbours, on one node
STRATEGIES = ("auto", "fsdp2", "ddp", "megatron_fsdp")
DTYPES = ("bfloat16", "float16", "float32")
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
# of each run: a second layout of the same sizes would have communicators, and their memory, of its own
_LAID_OUT: "WeakKeyDictionary[Any, dict[tuple[str, tuple[int, ...]], DeviceMesh]]" = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The sizes of the axes over which a run is spread; their product is the number of processes.

    Attributes:
        replicate: Copies of the model, each of which sees other rows (DDP; with `shard`, HSDP).
        shard: Ranks over which parameters, gradients and optimizer states are cut, each of which sees other rows (FSDP2). -1: as
            many as the others leave.
        context: Ranks over which the tokens of a row are cut.
        tensor: Ranks over which the products of a layer are cut; all see the same rows.
        strategy: "auto" (FSDP2 where `shard` or `context` is above 1, or `replicate` beside `tensor`, and where `param_dtype` or
            `offload` ask for it; else DDP), "fsdp2", "ddp", "megatron_fsdp" (by the package of that name, on GPUs).
        sequence_parallel: Whether what lies between the cut products is cut along the tokens over `tensor`.
        param_dtype: What FSDP2 gathers parameters in and computes with: "bfloat16", "float16", "float32"; None: as they are.
        reduce_dtype: What FSDP2 sums gradients in; None: as they are.
        offload: Whether FSDP2 keeps parameters, gradients and optimizer states in the memory of the host.
        prefetch: How many layers ahead FSDP2 gathers parameters.
        reshard: Whether FSDP2 frees the parameters of a layer between its forward and its backward.
        compile: Whether each layer is compiled by torch.compile.
        timeout_minutes: After how long a collective that a rank does not join is an error.

    Raises:
        ValueError: a size, a strategy or a dtype that there is not.
    """

    replicate: int = 1
    shard: int = -1
    context: int = 1
    tensor: int = 1
    strategy: str = "auto"
    sequence_parallel: bool = False
    param_dtype: str | None = None
    reduce_dtype: str | None = "float32"
    offload: bool = False
    prefetch: int = 1
    reshard: bool = True
    compile: bool = False
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            least = "at least 1, or -1 for what the others leave" if axis == "shard" else "at least 1"
            if type(size) is not int or (size < 1 and (axis, size) != ("shard", -1)):
                raise ValueError(f"Mesh: {axis} is {size!r}, expected a number of ranks, {least}.")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"Mesh: {unknown_name('strategy', str(self.strategy), list(STRATEGIES))}")
        for name in ("param_dtype", "reduce_dtype"):
            if (dtype := getattr(self, name)) is not None and dtype not in DTYPES:
                raise ValueError(f"Mesh: {unknown_name(name, str(dtype), [*DTYPES, 'None'])}")
        if self.prefetch < 0 or not self.timeout_minutes > 0:
            raise ValueError(
                f"Mesh: prefetch is {self.prefetch} and timeout_minutes {self.timeout_minutes}; expected a number of layers, and "
                "minutes above 0."
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "Mesh: sequence_parallel cuts tokens over the tensor ranks, but tensor is 1; expected 2 or more."
            )
        if self.strategy in ("ddp", "megatron_fsdp") and (self.param_dtype or self.offload):
            raise ValueError(
                f'Mesh: param_dtype and offload are FSDP2\'s, but strategy is {self.strategy!r}; use "fsdp2", or load the model in '
                "that dtype."
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """One size an axis, in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    def sized(self, world_size: int) -> "Mesh":
        """The same with `shard` filled in.

        Raises:
            ValueError: the axes do not give `world_size` processes.
        """
        others = self.replicate * self.context * self.tensor
        if self.shard == -1 and world_size % others == 0:
            return replace(self, shard=world_size // others)._served()
        if self.shard == -1 or others * self.shard != world_size:
            wanted = f"a multiple of {others}" if self.shard == -1 else f"{others * self.shard}"
            raise ValueError(
                f"Mesh: {self} needs {wanted} processes, but there are {world_size}; change a size, or start as many processes "
                "(torchrun --nproc-per-node, --nnodes)."
            )
        return self._served()

    def _served(self) -> "Mesh":
        if self.wrapping == "ddp" and self.shard * self.context * self.tensor != 1:
            raise ValueError(
                f'Mesh: strategy "ddp" keeps all parameters on each rank, but {self} cuts them; set '
                f'replicate={self.replicate * self.shard} and shard=1, or use strategy="fsdp2".'
            )
        if self.wrapping == "megatron_fsdp" and self.context * self.tensor != 1:
            raise ValueError(
                f'Mesh: strategy "megatron_fsdp" goes with replicate and shard alone, not with {self}; use strategy="fsdp2".'
            )
        return self

    def __str__(self) -> str:
        named = zip(AXES, self.sizes, strict=True)
        return " x ".join(f"{axis} {size}" for axis, size in named if size != 1) or "shard 1"

    @property
    def wrapping(self) -> str:
        """What spreads parameters and gradients over the data ranks: "fsdp2", "ddp", "megatron_fsdp", or "none"."""
        if self.strategy != "auto":
            return self.strategy
        asked = self.param_dtype is not None or self.offload
        if self.shard > 1 or self.context > 1 or (self.replicate > 1 and self.tensor > 1) or asked:
            return "fsdp2"
        return "ddp" if self.replicate > 1 else "none"

    def ranks(self, device_type: str | None = None) -> "Ranks":
        """Lay the running processes out; starts torch.distributed under torchrun where nobody has.

        Args:
            device_type: "cpu", "cuda", ...; default: what this machine trains on.

        Raises:
            ValueError: the axes do not give the number of processes, or this process was started alone but needs others.
            TimeoutError: processes that torchrun was told of have not come; their ranks.
        """
        device = device_type or this_machine().device
        if not dist.is_initialized():
            self._start(device)
        if not dist.is_initialized():
            return Ranks(self.sized(1), None)
        mesh = self.sized(dist.get_world_size())
        laid_out = _LAID_OUT.setdefault(dist.group.WORLD, {})
        if (device, mesh.sizes) not in laid_out:
            laid_out[device, mesh.sizes] = init_device_mesh(device, mesh.sizes, mesh_dim_names=AXES)
        return Ranks(mesh, laid_out[device, mesh.sizes])

    def _start(self, device: str) -> None:
        if not dist.is_torchelastic_launched():
            self.sized(1)  # its error says what is missing
            return
        timeout = timedelta(minutes=self.timeout_minutes)
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        assemble(store, rank, world_size, timeout)
        backend = BACKENDS.get(device)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
        if device != "cpu":
            torch.accelerator.set_device_index(dist.get_node_local_rank())


@dataclass(frozen=True, slots=True)
class Ranks:
    """A `Mesh` and its running processes.

    Attributes:
        mesh: With all sizes.
        device_mesh: Its axes are AXES; None where there is one process and no torch.distributed.
    """

    mesh: Mesh
    device_mesh: DeviceMesh | None

    @property
    def data_size(self) -> int:
        """How many ranks see rows of their own: what a DistributedSampler calls num_replicas."""
        return self.mesh.replicate * self.mesh.shard

    @property
    def data_rank(self) -> int:
        """Which of them this process is."""
        return self.rank_of("replicate") * self.mesh.shard + self.rank_of("shard")

    def rank_of(self, axis: str) -> int:
        """Where this process lies along an axis."""
        return 0 if self.device_mesh is None else self.device_mesh.get_local_rank(axis)

    def group(self, *axes: str) -> Any:
        """The process group of the ranks that differ along `axes` only; None where that is this process alone."""
        if self.device_mesh is None or all(getattr(self.mesh, axis) == 1 for axis in axes):
            return None
        return self.flat(*axes).get_group()

    def flat(self, *axes: str) -> DeviceMesh:
        """The axes as one."""
        assert self.device_mesh is not None
        if len(axes) == 1:
            return self.device_mesh[axes[0]]
        name = "_".join(axes)
        return self.device_mesh[axes]._flatten(name)

    @property
    def tokens_group(self) -> Any:
        """The ranks that see different tokens: over which losses are summed and numbers of tokens counted."""
        return self.group("replicate", "shard", "context")
