"""A model from its config alone, on the meta device: no weights are read or made."""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


def build_on_meta(name: str) -> nn.Module:
    """The model that `name` describes, with meta tensors for weights.

    Args:
        name: A folder with a config.json, a config.json itself, or a hub id.

    Raises:
        ValueError: there is no such config, it is broken, or the installed transformers cannot build it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    source = _source(name)
    _check(name, _config_dict(name, source))
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model: nn.Module = _model_class(config)._from_config(config)
    except (StrictDataclassError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: transformers cannot build this config: {' '.join(str(error).split())}") from error
    return model


def _source(name: str) -> str:
    """What to hand to transformers: a path that exists, or a hub id."""
    path = Path(name).expanduser()
    if path.is_file():
        return str(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{name}: the folder has no config.json; expected a folder that save_pretrained has written."
            )
        return str(path)
    if name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1:
        raise ValueError(f"{name}: no such file or folder; expected a model's folder, its config.json, or a hub id.")
    return name


def _config_dict(name: str, source: str) -> Any:
    from transformers import PretrainedConfig

    path = Path(source)
    if path.exists():
        try:
            return json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name}: the config is not valid JSON: {error}") from error
    try:
        return PretrainedConfig.get_config_dict(source)[0]
    except OSError as error:
        where = "no folder of that name here, and no config from the hub"
        raise ValueError(f"{name}: {where}: {str(error).splitlines()[0]}") from error


def _check(name: str, config: Any) -> None:
    from transformers import CONFIG_MAPPING, __version__

    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{name}: expected a JSON object with a model_type, as save_pretrained writes it.")
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise ValueError(
            f"{name}: model type {kind!r} brings its own code, which this command does not run. In Python: build it with "
            "trust_remote_code=True and print(automodel_accel.plan(model))."
        )
    near = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}: transformers {__version__} knows no model type {kind!r}; a newer one may.{hint}")


def _model_class(config: Any) -> Any:
    """The class that the config names, else the one that trains this kind of model, else the one without a head."""
    import transformers

    for class_name in config.architectures or ():
        named = getattr(transformers, class_name, None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    for mapping in (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_MASKED_LM_MAPPING,
        transformers.MODEL_MAPPING,
    ):
        if type(config) in mapping:
            return mapping[type(config)]
    raise ValueError(f"it has no class for a {type(config).__name__}")
