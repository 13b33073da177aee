"""Parameters and gradients over the data ranks: FSDP2, HSDP and DDP by torch, on the model in place; megatron-fsdp around it.

FSDP2 gathers a unit's parameters when the unit is called. Units are the layers, the input embeddings, the output head, and the
root with what is left (final norms; weights that units share). The head stays gathered from its forward to its backward: the
fused loss reads its weight after it was called.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from automodel_accel.kernels.facts import Facts
from automodel_accel.parallel.mesh import Ranks
from automodel_accel.parallel.tensor_local import placement
from automodel_accel.patches.checkpoint import checkpointed_layers
from automodel_accel.patches.heads import output_head
from automodel_accel.patches.probe import PROBE_ERRORS
from automodel_accel.patches.retype import original_class

MEGATRON_FSDP = "megatron-fsdp"
LAYER, EMBEDDING, HEAD = "layer", "embedding", "head"


@dataclass(frozen=True, slots=True)
class Unit:
    """A module whose parameters FSDP2 gathers together.

    Attributes:
        kind: LAYER, EMBEDDING or HEAD.
        path: Its dotted name.
        module: That.
    """

    kind: str
    path: str
    module: nn.Module


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers, in the order of the model: those that transformers can compute again, else those of the largest list."""
    found = checkpointed_layers(model) or _largest_list(model)
    inside = {id(child) for layer in found for child in layer.modules() if child is not layer}
    return [layer for layer in found if id(layer) not in inside]


def units_of(model: nn.Module) -> list[Unit]:
    """What FSDP2 gathers one by one; a module that shares a parameter with one outside of it belongs to the root."""
    kinds: dict[nn.Module, str] = dict.fromkeys(layers_of(model), LAYER)
    for module, kind in [*((m, EMBEDDING) for m in _embeddings(model)), *((m, HEAD) for m in _heads(model))]:
        if not any(module in set(unit.modules()) or unit in set(module.modules()) for unit in kinds):
            kinds[module] = kind
    paths = {module: path for path, module in model.named_modules()}
    users = _users(model)
    return [
        Unit(kind, paths[module], module)
        for module, kind in kinds.items()
        if module in paths and _is_closed(module, users) and next(module.parameters(), None) is not None
    ]


def root_of(model: nn.Module) -> nn.Module:
    """The module that is called in every forward: inside of PEFT's, whose `generate` calls the model in it."""
    base: nn.Module = model.get_base_model() if hasattr(type(model), "get_base_model") else model  # type: ignore[operator]
    return base if set(base.parameters()) == set(model.parameters()) else model


def check(model: nn.Module, ranks: Ranks, facts: Facts) -> None:
    """Everything that can be known before the first change.

    Raises:
        ValueError: the model is spread already, lies on another device, or has parameters that cannot be spread so; or the strategy
            needs a package or a device that is not here.
    """
    wrapping = ranks.mesh.wrapping
    _check_untouched(model)
    if ranks.device_mesh is None:
        if wrapping != "none":
            raise ValueError(
                f"Mesh: {wrapping} needs torch.distributed, also in one process: start it by torchrun --nproc-per-node 1, or leave "
                "strategy, param_dtype and offload out."
            )
        return
    _check_devices(model, ranks.device_mesh.device_type, facts)
    if wrapping == "megatron_fsdp":
        _check_megatron(facts)
    if wrapping in ("ddp", "megatron_fsdp") and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"this {type(model).__name__} is on meta, which FSDP2 alone can fill: load the model, or use Mesh(shard=...)."
        )
    if wrapping in ("fsdp2", "megatron_fsdp"):
        _check_kinds(model)


def spread(model: nn.Module, ranks: Ranks) -> tuple[nn.Module, str]:
    """Wrap the model, whose parameters are whole or cut over the tensor ranks.

    Returns:
        The model, the same object but for megatron-fsdp; and what was done, in words.
    """
    wrapping = ranks.mesh.wrapping
    if ranks.device_mesh is None:
        return model, "one process"
    if wrapping == "none":
        _move(model, device_of(ranks.device_mesh))
        return model, "all ranks see the same rows"
    if wrapping == "ddp":
        return model, _replicate(model, ranks)
    if wrapping == "megatron_fsdp":
        return _megatron(model, ranks)
    return model, _shard(model, ranks)


def share_values(model: nn.Module, device: torch.device) -> None:
    """Give parameters and buffers the values of the first rank: adapters and heads that were drawn differ from rank to rank."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta:
            continue
        sent = tensor.detach().to(device).contiguous()
        dist.broadcast(sent, 0)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(sent)


def _shard(model: nn.Module, ranks: Ranks) -> str:
    mesh = ranks.mesh
    settings = _settings(ranks)
    units = units_of(model)
    for unit in units:
        fully_shard(unit.module, reshard_after_forward=mesh.reshard and unit.kind != HEAD, **settings)
    fully_shard(root_of(model), reshard_after_forward=False, **settings)
    left = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not left, f"outside of the root: {left}"
    _prefetch([unit for unit in units if unit.kind == LAYER], mesh.prefetch)
    kinds = [unit.kind for unit in units]
    said = ", ".join(f"{kinds.count(kind)} {kind}{'s' * (kinds.count(kind) > 1)}" for kind in dict.fromkeys(kinds))
    name = "HSDP" if mesh.replicate > 1 else "FSDP2"
    extra = f", gathered in {mesh.param_dtype}" * bool(mesh.param_dtype) + ", offloaded" * mesh.offload
    return f"{name} in units of {said + ', ' if said else ''}root{extra}"


def _settings(ranks: Ranks) -> dict[str, Any]:
    mesh, device_mesh = ranks.mesh, data_mesh(ranks)
    dtypes = [None if name is None else getattr(torch, name) for name in (mesh.param_dtype, mesh.reduce_dtype)]
    offload = CPUOffloadPolicy(pin_memory=device_mesh.device_type == "cuda") if mesh.offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=dtypes[0], reduce_dtype=dtypes[1])
    return {"mesh": device_mesh, "mp_policy": policy, "offload_policy": offload, "shard_placement_fn": placement}


def data_mesh(ranks: Ranks) -> DeviceMesh:
    """Over which FSDP2 averages gradients: cut over its last axis, (shard x context), copied over its first, if there is one."""
    assert ranks.device_mesh is not None
    if ranks.mesh.context == 1:
        return ranks.device_mesh["replicate", "shard"] if ranks.mesh.replicate > 1 else ranks.device_mesh["shard"]
    cut = ranks.flat("shard", "context")
    # as FSDP2 joins its own mesh and that of tensor parallel; a flat axis cannot be asked for beside others
    return DeviceMesh._concatenate([ranks.device_mesh["replicate"], cut]) if ranks.mesh.replicate > 1 else cut


def _prefetch(layers: list[Unit], ahead: int) -> None:
    """One layer ahead is what FSDP2 does by itself. Layers of other lists may not be called at all, so they are not gathered."""
    lists: dict[str, list[Any]] = defaultdict(list)
    for unit in layers:
        lists[unit.path.rpartition(".")[0]].append(unit.module)
    for modules in lists.values():
        for number, module in enumerate(modules):
            if ahead > 1:
                module.set_modules_to_forward_prefetch(modules[number + 1 : number + 1 + ahead])
                module.set_modules_to_backward_prefetch(modules[max(0, number - ahead) : number][::-1])
            elif ahead == 0:
                module.set_modules_to_backward_prefetch([module])  # an empty list would mean FSDP2's own choice


def _replicate(model: nn.Module, ranks: Ranks) -> str:
    """torch's DistributedDataParallel, as hooks of the model."""
    assert ranks.device_mesh is not None
    name = type(model).__name__
    device = device_of(ranks.device_mesh)
    _move(model, device)
    replicate(
        model,
        device_id=device,
        process_group=ranks.group("replicate"),
        gradient_as_bucket_view=True,
        init_sync=False,  # share_values has done it
    )
    type(model).__name__ = name  # transformers writes it into config.json
    return "DDP"


def _move(model: nn.Module, device: torch.device) -> None:
    """What is whole; cut parameters are on their mesh."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor) and not tensor.is_meta and tensor.device != device:
            tensor.data = tensor.data.to(device)


def _megatron(model: nn.Module, ranks: Ranks) -> tuple[nn.Module, str]:
    from megatron_fsdp import MixedPrecisionPolicy as Precision
    from megatron_fsdp import fully_shard_model

    mesh = ranks.mesh
    hybrid = mesh.replicate > 1
    wrapped: nn.Module = fully_shard_model(
        model,
        device_mesh=ranks.device_mesh,
        dp_shard_dim="shard",
        dp_outer_dim="replicate" if hybrid else None,
        tp_dim="tensor",  # of size 1
        hybrid_fsdp_group=ranks.group("replicate", "shard") if hybrid else None,
        fsdp_unit_modules=list(dict.fromkeys(original_class(layer) for layer in layers_of(model))),
        mixed_precision_policy=Precision(
            main_params_dtype=None, grad_comm_dtype=getattr(torch, mesh.reduce_dtype) if mesh.reduce_dtype else None
        ),
    )
    return wrapped, "megatron-fsdp, gathered by layers"


def device_of(device_mesh: DeviceMesh) -> torch.device:
    """Of this process."""
    if device_mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_mesh.device_type, torch.accelerator.current_device_index())


def _largest_list(model: nn.Module) -> list[nn.Module]:
    """Of modules of one class, by the number of parameters."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    lists = [modules for modules in lists if len({type(module).__name__ for module in modules}) == 1]
    return max(lists, key=lambda modules: sum(p.numel() for m in modules for p in m.parameters()), default=[])


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    if not hasattr(model, "get_input_embeddings"):
        return
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except PROBE_ERRORS:  # a composite model may not say which of its embeddings it is
        return
    if isinstance(found, nn.Module):
        yield found


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if hasattr(type(module), "get_output_embeddings") and isinstance(head := output_head(module), nn.Module):
            yield head


def _users(model: nn.Module) -> dict[nn.Parameter, set[nn.Module]]:
    """The modules that hold each parameter."""
    users: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[parameter].add(module)
    return users


def _is_closed(unit: nn.Module, users: dict[nn.Parameter, set[nn.Module]]) -> bool:
    inside = set(unit.modules())
    return all(users[parameter] <= inside for parameter in unit.parameters())


def _check_untouched(model: nn.Module) -> None:
    name = type(model).__name__
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_replicate_state")
    if wrapped or any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            f"this {name} is wrapped already; give the model before DDP or fully_shard to apply(model, mesh=...)."
        )
    cut = [path for path, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    if cut:
        raise ValueError(
            f"{cut[0]} is a DTensor: somebody has spread this {name} already (from_pretrained with tp_plan or "
            "distributed_config); load it without."
        )


def _check_devices(model: nn.Module, device: str, facts: Facts) -> None:
    if device != "cpu" and device != facts.device:
        raise ValueError(f"Mesh: laid out over {device}, but this machine trains on {facts.device}; give apply a Mesh.")
    found = {str(p.device) for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    if len(getattr(model, "hf_device_map", ())) > 1 or len(found) > 1:
        raise ValueError(
            f"this {type(model).__name__} lies on {sorted(found)}; expected one device: load it without device_map, each rank "
            "moves its own part."
        )
    if any(not name.startswith(device) for name in found):
        raise ValueError(f"this {type(model).__name__} lies on {sorted(found)}, the mesh on {device}; move the model.")


def _check_megatron(facts: Facts) -> None:
    other = 'use strategy="fsdp2", which needs neither'
    if facts.device != "cuda":
        raise ValueError(
            f'strategy="megatron_fsdp" runs on CUDA devices, and this machine trains on {facts.device}; {other}.'
        )
    if not facts.has(MEGATRON_FSDP):
        raise ValueError(
            f'strategy="megatron_fsdp" needs the package {MEGATRON_FSDP}, which is not installed: pip install {MEGATRON_FSDP}; '
            f"or {other}."
        )


def _check_kinds(model: nn.Module) -> None:
    for path, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise ValueError(
                f"{path} is quantised ({type(parameter).__name__} of {parameter.dtype}), and FSDP2 cannot cut it; load the model "
                "unquantised, or give each rank all of it: Mesh(replicate=..., shard=1)."
            )
        if parameter.dim() == 0:
            raise ValueError(f'{path} is a single number, which FSDP2 cannot cut; use strategy="ddp".')


def check_dtypes(model: nn.Module) -> None:
    """What trains in one unit has one dtype.

    Raises:
        ValueError: it has not.
    """
    units = {unit.path: list(unit.module.parameters()) for unit in units_of(model)}
    taken = {parameter for parameters in units.values() for parameter in parameters}
    units["the root"] = [parameter for parameter in model.parameters() if parameter not in taken]
    for path, parameters in units.items():
        dtypes = sorted({str(parameter.dtype) for parameter in parameters if parameter.requires_grad})
        if len(dtypes) > 1:
            raise ValueError(
                f"{path} has trainable parameters of {' and '.join(dtypes)}, and FSDP2 reduces their gradients together; cast them "
                "to one dtype: model.to(torch.float32), and Mesh(param_dtype=...) to compute in another."
            )
