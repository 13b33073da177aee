"""Merge an adapter in PEFT's format into its base model, and write a plain model folder."""

import shutil
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights

# what a model folder holds beside weights and config; the adapter's own files win over the base's
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)


def merge_adapter(adapter: Path, to: Path, base: str | None) -> str:
    """Write the merged model into the folder `to`; returns what was done, in one sentence.

    Args:
        adapter: Folder with adapter_config.json.
        to: A new or empty folder.
        base: Folder or hub id of the base model; what the adapter names by default.

    Raises:
        ValueError: no adapter there, one that cannot be merged, one of another model, or a folder that is not empty.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(
            f"{adapter} holds no adapter_config.json; expected a folder written by PEFT's save_pretrained."
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is there already and not empty; expected a new folder.")
    config = PeftConfig.from_pretrained(str(adapter))
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not name its base model; give it with --base.")
    model = _with_adapter(_load(base), base, adapter, config)
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"a {config.peft_type} adapter has no weights to merge; load it with PEFT as it is.")
    merged = model.merge_and_unload(progressbar=True, safe_merge=True)
    merged.save_pretrained(to)
    _copy_companions(base, adapter, to)
    return f"{to}: {type(merged).__name__}, {base} with {adapter} merged into its weights"


def _load(base: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(base)
    architecture = next(iter(config.architectures or ()), "")
    cls = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
    return cls.from_pretrained(base, dtype="auto")


def _with_adapter(model: Any, base: str, adapter: Path, config: PeftConfig) -> Any:
    what = f"{adapter} is no adapter of {base}, a {type(model).__name__}"
    trained_on = (config.auto_mapping or {}).get("base_model_class") or type(model).__name__
    if trained_on != type(model).__name__ and hasattr(transformers, trained_on):  # else a wrapper's class
        raise ValueError(f"{what}: it was trained on a {trained_on}; give that model with --base.")
    own = set(model.state_dict())
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError) as error:  # sizes that differ, targets that are not there
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{what}: {reason}") from error
    if difference := _difference(adapted, adapter, own):
        raise ValueError(f"{what}: {difference}")
    return adapted


def _difference(adapted: Any, adapter: Path, own: set[str]) -> str | None:
    """Weights that only the files have, or only the model: PEFT passes over both. Embeddings may be in the files too."""
    saved = {name for name in load_peft_weights(str(adapter), device="cpu") if _base_name(name) not in own}
    wanted = {name for name in get_peft_model_state_dict(adapted) if _base_name(name) not in own}
    if more := saved - wanted:
        return f"it holds {min(more)} ({len(more)} weights in all), for which that model has no place."
    if less := wanted - saved:
        return f"it lacks {min(less)} ({len(less)} weights in all), for which that model has a place."
    return None


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _copy_companions(base: str, adapter: Path, to: Path) -> None:
    local = Path(base) if Path(base).is_dir() else Path(snapshot_download(base, allow_patterns=list(COMPANIONS)))
    for folder in (local, adapter):
        for pattern in COMPANIONS:
            for file in folder.glob(pattern):
                shutil.copy2(file, to / file.name)
