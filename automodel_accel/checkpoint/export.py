"""export: a model for others, in the formats of transformers and PEFT."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from automodel_accel.checkpoint.agreement import Agreement
from automodel_accel.checkpoint.boxes import boxes, local_part
from automodel_accel.checkpoint.files import PARTIAL, move
from automodel_accel.checkpoint.state import plain_model, plain_name, tied_names

EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT stores them where an adapter changes them


def export(model: nn.Module, folder: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Write a folder that plain transformers loads, or, of a model with PEFT's adapters, one that plain PEFT loads.

    On all ranks: the parts of one tensor after the other travel to rank 0, which alone holds the whole model, in the memory of the
    host, and has transformers' (or PEFT's) own save_pretrained write it: with its conversions of names, config and generation config.

    Args:
        model: As it trains: plain, or under DDP, FSDP2, HSDP, tensor parallel.
        folder: A new or empty one.
        max_shard_size: Above which the weights are spread over several files with an index, such as "5GB"; not for adapters.

    Raises:
        ValueError: the model is not of transformers or PEFT, or the folder is not empty.
        CheckpointError: another rank failed.
    """
    target, inside = Path(folder).absolute(), plain_model(model)
    ranks: Agreement[Any] = Agreement()
    ranks.alone(lambda: _check(inside, target))
    only = _adapter_names(inside) if hasattr(inside, "peft_config") else None
    state = gathered(model, ranks, only)
    ranks.alone(lambda: _write(inside, target, state, max_shard_size))
    ranks.close()


def _check(model: nn.Module, target: Path) -> None:
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"export: a {type(model).__name__} has no save_pretrained; expected a model of transformers or PEFT."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"export: {target} is there already and not empty; expected a new folder.")


def _adapter_names(model: Any) -> set[str]:
    """What PEFT may look for: what trains, what is named after an adapter, and embeddings."""
    marks = {*model.peft_config, *EMBEDDINGS}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {plain_name(name) for name in model.state_dict() if name in trained or marks & set(name.split("."))}


def gathered(model: nn.Module, ranks: Agreement[Any], only: set[str] | None = None) -> dict[str, torch.Tensor]:
    """The whole tensors by name, on rank 0 and in the memory of the host; empty on the other ranks."""
    state, found = get_model_state_dict(model), {}
    tied = tied_names(model)
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or name in tied or (only is not None and name not in only):
            continue
        whole = _whole(value, ranks)
        if whole is not None:
            found[name] = whole
    tied_too = {name: found[first] for name, first in tied.items() if name in state and first in found}
    return {**found, **tied_too}  # one memory, by which transformers and PEFT know that they are tied


def _whole(tensor: torch.Tensor, ranks: Agreement[Any]) -> torch.Tensor | None:
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu() if ranks.rank == 0 else None
    own = [(box.offsets, box.of(local_part(tensor)).cpu().contiguous()) for box in boxes(tensor) if _sends(tensor)]
    sent = ranks.send_to_first(own)
    if sent is None:
        return None
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for offsets, piece in (pair for pieces in sent for pair in pieces):
        whole[tuple(slice(at, at + size) for at, size in zip(offsets, piece.shape))] = piece
    return whole


def _sends(tensor: DTensor) -> bool:
    """Whether this rank is the one that sends its part: of replicas the first, of meshes the one with rank 0."""
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None or 0 not in mesh.mesh:
        return False
    return all(at == 0 for at, placement in zip(coordinate, tensor.placements) if placement.is_replicate())


def _write(model: Any, target: Path, state: dict[str, torch.Tensor], max_shard_size: int | str) -> None:
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    if hasattr(model, "get_base_model"):
        model.save_pretrained(partial, state_dict=state)
    else:
        model.save_pretrained(partial, state_dict=state, max_shard_size=max_shard_size)
    if target.is_dir():
        target.rmdir()
    move(partial, target)
