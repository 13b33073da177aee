"""Weights of a model that was spread on the meta device: each rank reads, or is given, its own part alone.

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = automodel_accel.apply(model, mesh=mesh)
    load_sharded(model, "folder")  # or draw_sharded(model)

What no checkpoint holds (rotary frequencies, adapters) is made by the model's own initialisation, one module at a time: memory
that was only allocated holds garbage. The mark that such memory is filled with must be gone in the end.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from automodel_accel.parallel.files import check_names, in_checkpoint, shapes_in, tensors_in

IS_MADE = "_is_hf_initialized"  # transformers' initialisation passes over what carries it
ADAPTERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
RESET = "reset_lora_parameters"  # a method of PEFT's layers


def load_sharded(model: nn.Module, folder: str | Path) -> None:
    """Read a checkpoint into a model that `apply(model, mesh=...)` has spread on the meta device; called on all ranks.

    Each rank reads its own part of each tensor. Adapters are drawn, alike on all ranks.

    Args:
        model: All of its parameters lie on meta.
        folder: With *.safetensors whose names are the model's.

    Raises:
        ValueError: the model is not on meta; a tensor is missing, left over or of another shape, or a file is broken; or the model's
            own initialisation leaves out something that the checkpoint does not hold.
    """
    _check_on_meta(model)
    read = _in_checkpoint(model)
    check_names(model, {name: tensor.shape for name, tensor in read.items()}, shapes_in(Path(folder)))
    _allocate(model)
    read = _in_checkpoint(model)
    _make(model, {id(tensor) for tensor in read.values()})
    tensors = {name: tensor.detach() for name, tensor in read.items()}
    packed = {name: tensors.pop(name) for name, tensor in read.items() if _is_packed(tensor)}
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    for name, whole in tensors_in(Path(folder), packed):
        part = packed[name]
        _keep_part(whole.to(part.device, part.dtype), part)


def draw_sharded(model: nn.Module) -> None:
    """Draw the weights by the model's own initialisation, alike on all ranks, into a model that was spread on the meta device.

    Raises:
        ValueError: the model is not on meta, or its initialisation leaves something out.
    """
    _check_on_meta(model)
    _allocate(model)
    _make(model, set())


def _check_on_meta(model: nn.Module) -> None:
    elsewhere = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    if elsewhere:
        raise ValueError(
            f"{elsewhere[0]} has values already; expected a model that was built on meta: with torch.device('meta'): ..."
        )


def _in_checkpoint(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint of the model without its adapters holds, tied weights once, by their names there."""
    once: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not any(f".{kind}." in name for kind in ADAPTERS):
            once.setdefault(id(tensor), (in_checkpoint(name), tensor))
    return dict(once.values())


def _allocate(model: nn.Module) -> None:
    """Memory for what lies on meta, tied as before; buffers are on the device also where parameters are offloaded."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    device = _device(model)
    model.to_empty(device=torch.device("cpu") if _is_offloaded(model) else device)
    for first, *others in names.values():
        for other in others:
            path, _, last = other.rpartition(".")
            setattr(model.get_submodule(path), last, model.get_parameter(first))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _device(model: nn.Module) -> torch.device:
    meshes = (parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor))
    kind = next((mesh.device_type for mesh in meshes), "cpu")
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def _is_offloaded(model: nn.Module) -> bool:
    groups = (
        group
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    )
    return any(isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups)


@torch.no_grad()
def _make(model: nn.Module, read: set[int]) -> None:
    """Initialise what is not read."""
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers()) if id(t) not in read}
    for _, buffer in model.named_buffers():
        if id(buffer) not in read:
            buffer.fill_(_mark(buffer.dtype))
    for module, owner in _owned(model, None):
        with _whole(_parts(module, ADAPTERS) if hasattr(type(module), RESET) else [module], read) as made:
            if hasattr(type(module), RESET):
                _reset(module, model)
            elif owner is not None:
                owner._init_weights(module)
        left = [names.get(id(tensor), "a weight") for tensor, whole in made if _is_marked(whole)]
        left += [names[id(buffer)] for buffer in module._buffers.values() if id(buffer) in names and _is_marked(buffer)]
        if left:
            raise ValueError(
                f"the initialisation of {type(owner or model).__name__} leaves out {left[0]}, which no checkpoint holds; build and "
                "load the model outside of torch.device('meta'), and apply it then."
            )


def _owned(module: nn.Module, owner: Any, inside: bool = False) -> Iterator[tuple[nn.Module, Any]]:
    """Every module once that has something to initialise, and the model of transformers that does it; what is in adapters is
    initialised by these."""
    owner = module if hasattr(type(module), "_init_weights") else owner
    adapts = hasattr(type(module), RESET)
    if adapts or ((module._parameters or module._buffers) and not inside):
        yield module, owner
    for name, child in module.named_children():
        yield from _owned(child, owner, name in ADAPTERS if adapts else inside)


def _parts(module: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    return [part for name in names for part in getattr(module, name).modules()]


@contextmanager
def _whole(modules: Iterable[nn.Module], read: set[int]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Inside, parameters that are not read are whole and plain; afterwards each rank has its part of the first rank's values."""
    made: list[tuple[torch.Tensor, torch.Tensor]] = []
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in modules:
        kept.append((module._parameters, dict(module._parameters)))
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in read:
                setattr(parameter, IS_MADE, True)
            elif parameter is not None:
                new = torch.full(parameter.shape, float("nan"), dtype=parameter.dtype, device=_device_of(parameter))
                made.append((parameter, new))
                module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
    try:
        yield made
    finally:
        for parameters, before in kept:
            parameters.update(before)
            for parameter in before.values():
                if hasattr(parameter, IS_MADE):
                    delattr(parameter, IS_MADE)
    for tensor, whole in made:
        _cut(whole, tensor)


def _device_of(parameter: torch.Tensor) -> torch.device:
    """Where ranks can exchange a whole parameter."""
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != "cpu":
        return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())
    return parameter.device


def _is_packed(tensor: torch.Tensor) -> bool:
    """Whether a rank holds several pieces along one dimension, such as rows of the gate and of up: torch's reader of checkpoints
    takes them for one piece. Along the last axis of a mesh, as FSDP2 on top of a plain cut is strided along its own."""
    return isinstance(tensor, DTensor) and isinstance(tensor.placements[-1], _StridedShard)


def _cut(whole: torch.Tensor, parameter: torch.Tensor) -> None:
    dist.broadcast(whole, 0)
    _keep_part(whole, parameter)


def _keep_part(whole: torch.Tensor, parameter: torch.Tensor) -> None:
    if isinstance(parameter, DTensor):
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    else:
        parameter.copy_(whole)


def _reset(layer: Any, model: nn.Module) -> None:
    """As PEFT draws the adapters of one layer."""
    for name in layer.r:
        how = model.peft_config[name].init_lora_weights  # type: ignore[index, union-attr]
        for part in _parts(layer, ADAPTERS) if how is False else ():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()  # type: ignore[operator]
        layer.reset_lora_parameters(name, how)


def _mark(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return False  # leaves no trace
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


def _is_marked(tensor: torch.Tensor | None) -> bool:
    if tensor is None:
        return False
    mark = _mark(tensor.dtype)
    marked = tensor.isnan() if mark != mark else tensor == mark
    return tensor.dtype != torch.bool and bool(marked.any())
