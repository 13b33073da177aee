"""Tiny models: of the type of a large one, with what makes it hard (experts, towers, soft caps, tied embeddings), offline.

    tiny_config("Qwen/Qwen3-30B-A3B")                      # 2 layers, 4 experts; by its name where no config is at hand
    tiny_model("./my-model", "image_text_to_text")         # random weights, in training mode

`shrink` makes any configuration tiny from its fields alone; `searching` finds a way to build a type that trains, and batches for it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel, __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from automodel_accel.recipes.tiny.building import MAPPINGS, Type
from automodel_accel.recipes.tiny.names import UnknownModel, type_of_name
from automodel_accel.recipes.tiny.searching import Tiny, Unbuildable, build, find_way

__all__ = ["Found", "Tiny", "UnknownModel", "find_type", "tiny", "tiny_config", "tiny_model"]

KINDS = {"causal_lm": "causal", "image_text_to_text": "vlm"}
_CANNOT_READ = (OSError, ValueError, KeyError, StrictDataclassError)


@dataclass(frozen=True, slots=True)
class Found:
    """Where the type of a model is known from.

    Attributes:
        type: What a tiny model is made of.
        where: "its config.json", "the cache of the hub" or "its name".
    """

    type: Type
    where: str


def find_type(path_or_type: str, task: str = "causal_lm") -> Found:
    """The type of a model, without a network.

    Args:
        path_or_type: A folder with a config.json, such a file, a hub id, or a model type of transformers. Of a hub id the
            config in the cache is taken; where there is none, its name says the type, and the defaults of that type are shrunk.
        task: "causal_lm" or "image_text_to_text": which class of the type.

    Raises:
        UnknownModel: the type is not found, or the installed transformers has none of that name or no class of it for the task.
    """
    source, where = _source(path_or_type)
    if source is not None:
        # the checkpoint's own precision is none of a model with random weights
        vars(source).pop("quantization_config", None)
        return Found(Type(_served(source.model_type, task, path_or_type), KINDS[task], source), where)
    name = path_or_type if path_or_type in CONFIG_MAPPING else type_of_name(path_or_type, list(CONFIG_MAPPING.keys()))
    return Found(Type(_served(name, task, path_or_type), KINDS[task]), where)


def tiny_config(path_or_type: str, task: str = "causal_lm") -> PreTrainedConfig:
    """A configuration of the same type with 2 layers, a hidden size of 64 and 256 words.

    Args:
        path_or_type: As in `find_type`.
        task: As in `find_type`.

    Raises:
        UnknownModel: as `find_type`; or no tiny model of that type trains.
    """
    return tiny_model(path_or_type, task, device="meta").config


def tiny_model(
    path_or_type: str,
    task: str = "causal_lm",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> PreTrainedModel:
    """A tiny model of the same type, in training mode, without dropout; the same for the same seed.

    Args:
        path_or_type: As in `find_type`.
        task: As in `find_type`.
        dtype: Of its parameters.
        seed: Of its weights.
        device: "cpu", or "meta" for no weights.

    Raises:
        UnknownModel: as `find_type`; or no tiny model of that type trains.
    """
    model = tiny(find_type(path_or_type, task).type, dtype=dtype, seed=seed).model
    return model if device == "cpu" else model.to(torch.device(device))  # type: ignore[arg-type]  # its stub has none


def tiny(of: Type, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tiny:
    """A tiny model with batches that it trains on, images included; found by trying.

    Raises:
        UnknownModel: no tiny model of that type trains.
    """
    try:
        return build(of, find_way(of), dtype, seed)
    except Unbuildable as error:
        raise UnknownModel(f"no tiny model of type {of.name!r} could be built and trained: {error}") from error


def _source(path_or_type: str) -> tuple[PreTrainedConfig | None, str]:
    local = Path(path_or_type).expanduser()
    if path_or_type in CONFIG_MAPPING:
        return None, "its type"
    if local.exists():
        try:
            return AutoConfig.from_pretrained(local), "its config.json"
        except _CANNOT_READ as error:
            raise UnknownModel(f"{path_or_type}: {' '.join(str(error).split())[:300]}") from error
    try:
        return AutoConfig.from_pretrained(path_or_type, local_files_only=True), "the cache of the hub"
    except _CANNOT_READ:
        return None, "its name"


def _served(name: str, task: str, path: str) -> str:
    """The type, or the one of its part that the task trains."""
    known = MAPPINGS[KINDS[task]]
    for candidate in (name, f"{name}_thinker"):
        if candidate in known:
            return candidate
    raise UnknownModel(
        f"{path}: transformers {__version__} has no class of type {name!r} for {task}; {_instead(name)}."
    )


def _instead(name: str) -> str:
    others = [task for task, kind in KINDS.items() if name in MAPPINGS[kind]]
    if name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "it is trained from sequence to sequence, which recipes do not do"
    return f"it has one for {others[0]}; set model.task" if others else "it has none that learns to write text"
