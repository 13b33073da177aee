"""State: what a run consists of, as tensors by name and as plain values; and back."""

import itertools
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from automodel_accel.checkpoint.plain import decode, encode
from automodel_accel.checkpoint.tensors import DTYPES, Stored

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside of DDP and torch.compile."""
    inside = next((getattr(model, name) for name in ("module", "_orig_mod") if name in model._modules), None)
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod")
    return plain_model(inside) if wrapped and inside is not None else model


def named_tensors(model: nn.Module, frozen: bool = True) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by their names without wrappers; a tied one once, by its first name.

    Args:
        model: As it trains.
        frozen: Whether parameters that do not train are among them.

    Raises:
        ValueError: the model has state that is no tensor.
    """
    state = get_model_state_dict(model)  # it also has FSDP2 put sharded parameters back
    tied, found = tied_names(model), {}
    left_out = set() if frozen else frozen_names(model)
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            if value is None or name.endswith("_extra_state"):
                continue
            raise ValueError(f"{name} of the model is a {type(value).__name__}; a checkpoint holds tensors.")
        if (plain := plain_name(name)) not in tied and plain not in left_out:
            found[plain] = value
    return found


def frozen_names(model: nn.Module) -> set[str]:
    """Of the parameters that do not train."""
    return {
        plain_name(name) for name, parameter in plain_model(model).named_parameters() if not parameter.requires_grad
    }


def tied_names(model: nn.Module) -> dict[str, str]:
    """Name of a parameter that has more than one -> its first name."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in plain_model(model).named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), plain := plain_name(name)) != plain:
            tied[plain] = first[id(parameter)]
    return tied


def plain_name(name: str) -> str:
    """The name without what torch.compile and checkpoint wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """One or more optimizers.

    Attributes:
        tensors: "optimizer number/parameter/name of the state" -> tensor.
        plain: Groups, and the states that are no tensors, in JSON's types.
    """

    tensors: dict[str, torch.Tensor]
    plain: list[Any]


def parameter_names(model: nn.Module) -> dict[int, str]:
    """id of a parameter -> its name."""
    names: dict[int, str] = {}
    for name, parameter in plain_model(model).named_parameters():
        names[id(parameter)] = plain_name(name)
    return names


def optimizer_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> OptimizerState:
    """Take the optimizers apart, without a step and without a copy.

    Raises:
        ValueError: a parameter that is not the model's, or a state that cannot be cut over ranks.
    """
    names = parameter_names(model)
    tensors: dict[str, torch.Tensor] = {}
    plain = []
    for number, optimizer in enumerate(optimizers):
        groups, states = [], {}
        for group in optimizer.param_groups:
            settings = {
                key: encode(value, f"optimizer setting {key}") for key, value in group.items() if key != "params"
            }
            groups.append({"params": [_name(parameter, names) for parameter in group["params"]], "settings": settings})
            for parameter in group["params"]:
                name = _name(parameter, names)
                states[name] = _take(number, name, parameter, optimizer.state.get(parameter, {}), tensors)
        plain.append({"kind": type(optimizer).__name__, "groups": groups, "states": states})
    return OptimizerState(tensors, plain)


def _name(parameter: torch.Tensor, names: Mapping[int, str]) -> str:
    if id(parameter) not in names:
        raise ValueError(
            f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not the model's; make the optimizer after the "
            "model is wrapped, from its parameters."
        )
    return names[id(parameter)]


def _take(
    number: int, name: str, parameter: torch.Tensor, state: Mapping[str, Any], tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """The states of one parameter: null for a tensor, which goes to `tensors`."""
    plain: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            if isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.numel() > 1:
                raise ValueError(
                    f"the optimizer keeps {key} of {name} in a plain tensor of {value.numel()} values, though the parameter is cut over "
                    "ranks; a checkpoint cannot tell which part that is. Use an optimizer of torch, or DDP."
                )
            tensors[f"{number}/{name}/{key}"] = value
            plain[key] = {"tensor": True, "like": tuple(value.shape) == tuple(parameter.shape)}
        else:
            plain[key] = {"value": encode(value, f"optimizer state {key} of {name}")}
    return plain


def optimizer_targets(
    model: nn.Module, optimizers: Sequence[Optimizer], plain: Sequence[Any], stored: Mapping[str, Stored]
) -> dict[str, torch.Tensor]:
    """Tensors for the stored states to be read into, placed as the parameters are; the optimizers are not changed yet.

    Raises:
        ValueError: other optimizers, or other groups of parameters, than were saved.
    """
    names = parameter_names(model)
    _same_optimizers(optimizers, plain, names)
    targets = {}
    for number, (optimizer, saved) in enumerate(zip(optimizers, plain)):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, what in saved["states"][names[id(parameter)]].items():
                    if what.get("tensor"):
                        full = f"{number}/{names[id(parameter)]}/{key}"
                        live = optimizer.state.get(parameter, {}).get(key)
                        targets[full] = _target(full, parameter, group, live, what["like"], stored[full])
    return targets


def _target(
    full: str, parameter: torch.Tensor, group: Mapping[str, Any], live: Any, like: bool, stored: Stored
) -> torch.Tensor:
    dtype = TORCH_DTYPES[stored.dtype]
    if isinstance(live, torch.Tensor) and live.shape == torch.Size(stored.shape) and live.dtype == dtype:
        return live.detach().clone()
    if like and parameter.dim() > 0:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if isinstance(parameter, DTensor) and len(stored.parts) > 1:
        raise ValueError(
            f"{full} has shape {list(stored.shape)}, another than its parameter, and is cut over ranks; let the optimizer make its "
            "states first, so that one knows how."
        )
    counts_on_host = full.endswith("/step") and not (group.get("fused") or group.get("capturable"))
    device = torch.device("cpu") if counts_on_host else parameter.device  # as torch.optim does
    return torch.empty(stored.shape, dtype=dtype, device=device)


def _same_optimizers(optimizers: Sequence[Optimizer], plain: Sequence[Any], names: Mapping[int, str]) -> None:
    here, there = [type(one).__name__ for one in optimizers], [saved["kind"] for saved in plain]
    if [_bare(kind) for kind in here] != [_bare(kind) for kind in there]:
        raise ValueError(f"the checkpoint is of the optimizers {there or 'none'}; these are {here or 'none'}.")
    for optimizer, saved in zip(optimizers, plain):
        mine = [[_name(parameter, names) for parameter in group["params"]] for group in optimizer.param_groups]
        theirs = [group["params"] for group in saved["groups"]]
        if mine != theirs:
            sizes = [len(group) for group in mine], [len(group) for group in theirs]
            pairs = zip(itertools.chain(*mine), itertools.chain(*theirs))
            first = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
            raise ValueError(
                f"the optimizer has groups of {sizes[0]} parameters, the checkpoint's of {sizes[1]}; the first difference: {first[0]!r} "
                f"instead of {first[1]!r}. Build the groups as when it was saved."
            )


def _bare(kind: str) -> str:
    return kind.removeprefix("Fused")


def put_optimizers(
    model: nn.Module, optimizers: Sequence[Optimizer], plain: Sequence[Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Give the optimizers the states that were read, in the dtypes that were saved (load_state_dict would cast them)."""
    names = parameter_names(model)
    for number, (optimizer, saved) in enumerate(zip(optimizers, plain)):
        for group, kept in zip(optimizer.param_groups, saved["groups"]):
            for key, value in decode(kept["settings"]).items():
                if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value
            for parameter in group["params"]:
                name = names[id(parameter)]
                optimizer.state[parameter] = {
                    key: tensors[f"{number}/{name}/{key}"] if what.get("tensor") else decode(what["value"])
                    for key, what in saved["states"][name].items()
                }
                if not optimizer.state[parameter]:
                    del optimizer.state[parameter]


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators of this rank: Python's, numpy's if it is there, torch's on the host and on the device."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        state["numpy"] = numpy.random.get_state()
    if device.type not in ("cpu", "meta"):
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    encoded: dict[str, Any] = encode(state, "random state")
    return encoded


def put_random_state(encoded: Mapping[str, Any], device: torch.device) -> None:
    """Set them; one that was not saved is left."""
    state = decode(dict(encoded))
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.set_state(state["numpy"])
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], device)


def seed_of_new_rank(step: int, rank: int) -> int:
    """The seed of a rank that there was none of when the checkpoint was saved."""
    return int.from_bytes(sha256(f"{step} {rank}".encode()).digest()[:4], "big")


def seed_everything(seed: int) -> None:
    """All generators of this rank."""
    random.seed(seed)
    torch.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


def differences(model: nn.Module, here: Mapping[str, torch.Tensor], saved: Mapping[str, Any]) -> list[str]:
    """In what the model is another than the saved one, in words; nothing if it is the same."""
    found = []
    if (kind := config_class(model)) != saved["config"]:
        found.append(f"the configuration is a {kind}, the checkpoint's a {saved['config']}")
    stored: Mapping[str, Stored] = saved["tensors"]
    if missing := [name for name in stored if name not in here]:
        found.append(f"{len(missing)} names of the checkpoint are not in the model ({', '.join(missing[:3])})")
    if extra := [name for name in here if name not in stored]:
        found.append(f"{len(extra)} names of the model are not in the checkpoint ({', '.join(extra[:3])})")
    both = [(name, tensor, stored[name]) for name, tensor in here.items() if name in stored]
    shapes = [
        f"{name} is {list(tensor.shape)}, the checkpoint's {list(other.shape)}"
        for name, tensor, other in both
        if tuple(tensor.shape) != tuple(other.shape)
    ]
    dtypes = [
        f"{name} is {tensor.dtype}, the checkpoint's {TORCH_DTYPES[other.dtype]}"
        for name, tensor, other in both
        if tensor.dtype != TORCH_DTYPES[other.dtype]
    ]
    return found + shapes[:3] + dtypes[:3]


def config_class(model: nn.Module) -> str:
    """The class of a Hugging Face model's configuration, or of the model."""
    bare = plain_model(model)
    return type(getattr(bare, "config", bare)).__name__.removeprefix("FSDP")  # FSDP2 derives a class of that name
