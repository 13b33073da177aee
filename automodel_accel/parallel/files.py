"""Names and shapes in a checkpoint of safetensors, against those of a model."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

IN_ADAPTED = (("base_model.model.", ""), (".base_layer.", "."))  # what PEFT puts into names
SHOWN = 3


def in_checkpoint(name: str) -> str:
    """The name of a tensor of an adapted model in a checkpoint of the model without adapters."""
    for put, before in IN_ADAPTED:
        name = name.replace(put, before)
    return name


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of all tensors, from the heads of the files.

    Raises:
        ValueError: there are no files, or one is broken.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: expected a folder with *.safetensors, as save_pretrained writes it; found none.")
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole file of safetensors: {error}") from error
    return found


def tensors_in(folder: Path, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of these names, whole, one after the other."""
    for path in sorted(folder.glob("*.safetensors")) if names else ():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in names:
                    yield name, file.get_tensor(name)


def check_names(model: Any, wanted: Mapping[str, Iterable[int]], found: Mapping[str, tuple[int, ...]]) -> None:
    """What a model takes from a checkpoint, and what is there, are the same.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    missing = [name for name in wanted if name not in found]
    extra = [n for n in found if n not in wanted and not any(re.search(pattern, n) for pattern in ignored)]
    if tied := _tied(model):
        extra = [name for name in extra if name not in tied]
    if missing or extra:
        parts = (("missing", missing), ("left over", extra))
        said = "; ".join(f"{what}: {_some(names)}" for what, names in parts if names)
        raise ValueError(
            f"the names in the checkpoint are not those of this {type(model).__name__}: {said}. If transformers converts names or "
            "experts of this architecture as it loads them, do that once: model = from_pretrained(...), then "
            "model.save_pretrained(folder, save_original_format=False)."
        )
    for name, shape in wanted.items():
        if tuple(shape) != found[name]:
            raise ValueError(
                f"{name} is {found[name]} in the checkpoint, and {tuple(shape)} in this {type(model).__name__}."
            )


def _tied(model: nn.Module) -> set[str]:
    """Names under which a tied weight may have been saved once more."""
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_parameter.setdefault(id(parameter), []).append(in_checkpoint(name))
    return {name for names in by_parameter.values() for name in names[1:]}


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
