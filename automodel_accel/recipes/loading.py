"""The model, the tokenizer and the adapters that a recipe names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from automodel_accel.api import apply
from automodel_accel.config import AccelConfig
from automodel_accel.demo import is_demo, resolve
from automodel_accel.freezing import freeze, lora_exclusion
from automodel_accel.kernels.facts import this_machine
from automodel_accel.parallel import load_sharded
from automodel_accel.parallel.mesh import Ranks
from automodel_accel.recipes.recipe import Lora, Model, Recipe

IMAGES, TEXT = "image_text_to_text", "causal_lm"
AUTO: dict[str, Any] = {TEXT: transformers.AutoModelForCausalLM, IMAGES: transformers.AutoModelForImageTextToText}
CLASSES = {
    TEXT: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    IMAGES: transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}
MOST_IN_MEMORY = 0.5  # of the host's memory that whole copies of all of a node's ranks may take


def located(path: str) -> str:
    """What to hand to transformers: a folder that exists, or a hub id.

    Raises:
        ValueError: it looks like a path, and there is none.
    """
    if is_demo(path):
        return str(resolve(path))
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.path {path}: a folder without config.json; expected what save_pretrained writes.")
        return str(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        near = folder.parent
        while not near.exists():
            near = near.parent
        raise ValueError(f"model.path {path}: does not exist; {near.resolve()} does.")
    return path


def load_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer, or for images the processor; None where the data are tokens already and the model brings none.

    Raises:
        ValueError: there is none that can be read.
    """
    model = recipe.model
    source = located(model.tokenizer or model.path)
    auto = transformers.AutoProcessor if recipe.has_images else transformers.AutoTokenizer
    try:
        return auto.from_pretrained(source, **_from(model), **(model.processor if recipe.has_images else {}))
    except (OSError, ValueError, TypeError, ImportError) as error:
        if recipe.data.kind in ("mock", "bins") and model.tokenizer is None:
            return None
        raise ValueError(
            f"model.{'tokenizer' if model.tokenizer else 'path'} {model.tokenizer or model.path}: no "
            f"{'processor' if recipe.has_images else 'tokenizer'}: {_short(error)}"
        ) from error


def task_of(recipe: Recipe, config: Any = None) -> str:
    """Which of transformers' auto classes builds the model.

    Args:
        recipe: What it asks for, else what its data are.
        config: Of the model: where the recipe leaves it open and the type has a class for the other task alone, it is that one, such
            as for text and a model that is always given with its vision tower.
    """
    if recipe.model.task != "auto":
        return recipe.model.task
    wanted, other = (IMAGES, TEXT) if recipe.has_images else (TEXT, IMAGES)
    return other if type(config) not in CLASSES[wanted] and type(config) in CLASSES[other] else wanted


def load_config(model: Model) -> Any:
    """The model's config, changed as the recipe wants it.

    Raises:
        ValueError: there is none that can be read, or it has no such setting.
    """
    source = located(model.path)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **_from(model))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.path {model.path}: {_short(error)}") from error
    _change(config, model.config, "model.config")
    return config


def _change(config: Any, settings: Mapping[str, Any], place: str) -> None:
    for name, value in settings.items():
        if not hasattr(config, name):
            raise ValueError(f"{place}: {type(config).__name__} has no setting {name!r}.")
        if isinstance(value, Mapping) and hasattr(getattr(config, name), "to_dict"):
            _change(getattr(config, name), value, f"{place}.{name}")
        else:
            setattr(config, name, value)


def load_model(recipe: Recipe, ranks: Ranks) -> nn.Module:
    """The model as it trains: with its frozen parts and adapters, applied, spread over the ranks, on their device.

    Raises:
        ValueError: what cannot be read, adapted, frozen or spread.
    """
    made, config, device = recipe.model, load_config(recipe.model), device_of(ranks)
    task = task_of(recipe, config)
    in_parts = _in_parts(made, config, task, ranks)
    if in_parts:
        with torch.device("meta"):
            model = AUTO[task].from_config(config, **_building(made))
    elif made.weights == "random":
        model = AUTO[task].from_config(config, **_building(made))
    else:
        model = _pretrained(made, task, config, device)
    if not in_parts and not made.quantize:
        model = model.to(device)
    return prepared(recipe, model, ranks, located(made.path) if in_parts else None)


def prepared(recipe: Recipe, model: nn.Module, ranks: Ranks, folder: str | None = None) -> nn.Module:
    """Freeze, adapt, apply, spread; then read the weights from a folder where the model is on meta."""
    parts = recipe.model.freeze.parts()
    lora = None if recipe.lora is None else _lora(recipe.lora, model, parts)
    if parts:
        freeze(model, *parts)
    if recipe.model.quantize:
        import peft

        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    settings = AccelConfig() if recipe.accel is False else recipe.accel_config()
    if recipe.accel is not False:
        model = apply(model, settings, lora=lora, mesh=ranks)
    elif ranks.device_mesh is not None:
        raise ValueError(
            "accel: false leaves the model alone, which a mesh of several processes does not; leave it out."
        )
    elif lora is not None:
        from automodel_accel.adapters import with_lora

        model = with_lora(model, lora)
    if folder is not None:
        load_sharded(model, folder)
    return model


def load_teacher(model: Model, ranks: Ranks) -> nn.Module:
    """A model that is only asked: applied, frozen, in eval mode, whole on each rank."""
    config, device = load_config(model), device_of(ranks)
    teacher: nn.Module = (
        AUTO[TEXT].from_config(config, **_building(model))
        if model.weights == "random"
        else _pretrained(model, TEXT, config, device)
    )
    return apply(teacher.to(device).requires_grad_(False).eval())


def device_of(ranks: Ranks) -> torch.device:
    """Where this rank trains."""
    name = this_machine().device if ranks.device_mesh is None else ranks.device_mesh.device_type
    return torch.device(name) if name == "cpu" else torch.device(name, torch.accelerator.current_device_index())


def _pretrained(model: Model, task: str, config: Any, device: torch.device) -> Any:
    try:
        return AUTO[task].from_pretrained(
            located(model.path), config=config, **_from(model), **_building(model), **_quantization(model, device)
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model.path {model.path}: {_short(error)}") from error


def _quantization(model: Model, device: torch.device) -> dict[str, Any]:
    if model.quantize is None:
        return {}
    if not this_machine().has("bitsandbytes"):
        raise ValueError("model.quantize is bitsandbytes'; install it: pip install 'automodel-accel[bnb]'.")
    dtype = dtype_of(model)
    settings = (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        if model.quantize == "nf4"
        else {"load_in_8bit": True}
    )
    kind: Any = transformers.BitsAndBytesConfig
    made = kind(**settings, bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": made, "device_map": {"": device}}


def _from(model: Model) -> dict[str, Any]:
    revision = {} if model.revision is None else {"revision": model.revision}
    return {"trust_remote_code": model.trust_remote_code, **revision}


def _building(model: Model) -> dict[str, Any]:
    attention = {} if model.attn_implementation is None else {"attn_implementation": model.attn_implementation}
    return {"dtype": dtype_of(model), **attention}


def dtype_of(model: Model) -> torch.dtype:
    """Of the parameters."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)  # type: ignore[no-any-return]
    return torch.float32 if this_machine().device == "cpu" else torch.bfloat16


def _in_parts(model: Model, config: Any, task: str, ranks: Ranks) -> bool:
    """Whether each rank reads only its part: where whole copies would not fit beside each other, and it is possible."""
    mesh = ranks.mesh
    possible = (
        model.weights == "pretrained" and model.quantize is None and (mesh.wrapping == "fsdp2" or mesh.tensor > 1)
    )
    if not possible or ranks.device_mesh is None or not Path(located(model.path)).is_dir():
        return False
    with torch.device("meta"):
        size = sum(one.numel() for one in AUTO[task].from_config(config).parameters()) * dtype_of(model).itemsize
    here = min(torch.distributed.get_world_size(), max(torch.accelerator.device_count(), 1))
    return bool(size * here > MOST_IN_MEMORY * _host_memory())


def _host_memory() -> int:
    """Bytes."""
    import psutil

    return int(psutil.virtual_memory().total)


def _lora(lora: Lora, model: nn.Module, parts: tuple[str, ...]) -> dict[str, Any]:
    config = lora.config()
    if parts and lora.exclude_modules is None:
        config["exclude_modules"] = lora_exclusion(model, *parts)
    return config


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
