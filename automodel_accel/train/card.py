"""The model card of a run: what was trained, on what, and what came of it, as Hugging Face's hub shows it."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from automodel_accel.demo import is_demo
from automodel_accel.kernels.facts import this_machine

PACKAGES = ("transformers", "peft", "accelerate")
_TEXT = """---
{header}
---

# {name}

{what}

## Figures

| | |
|---|---|
{figures}

{held_out}
## How to load it

```python
{loading}
```

## How it was trained

By automodel_accel {version}, `automodel-accel train`, with this recipe:

<details><summary>recipe.yaml</summary>

```yaml
{recipe}
```

</details>
"""


def model_card(recipe: Mapping[str, Any], figures: Mapping[str, Any], merged: bool = False) -> str:
    """README.md of an exported model: nothing that the run does not know.

    Args:
        recipe: As `to_plain` gives it.
        figures: Of the run, as in figures.json.
        merged: Whether what is exported has its adapter in its weights.
    """
    base, is_adapter = _public(recipe["model"]["path"]), recipe["lora"] is not None and not merged
    name = Path(recipe["output"]).name
    return _TEXT.format(
        header=_header(recipe, base, is_adapter),
        name=name,
        what=_what(recipe, base, is_adapter),
        figures="\n".join(f"| {key} | {value} |" for key, value in _figures(figures)),
        held_out=_held_out(figures),
        loading=_loading(name if merged else f"{name}/model", base, is_adapter, recipe),
        version=_version(),
        recipe=yaml.safe_dump(_shared(recipe), sort_keys=False).rstrip(),
    )


def _header(recipe: Mapping[str, Any], base: str | None, is_adapter: bool) -> str:
    source = recipe["data"].get("path")
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        base_model=base,
        datasets=[source] if source and _is_on_hub(source) else None,
        tags=["automodel_accel", *(["lora"] if is_adapter else [])],
        pipeline_tag="image-text-to-text" if _has_images(recipe) else "text-generation",
    )
    return str(data.to_yaml())


def _what(recipe: Mapping[str, Any], base: str | None, is_adapter: bool) -> str:
    of = f" of {base}" if base else ""
    if is_adapter:
        return f"LoRA adapter{of}, rank {recipe['lora']['r']}."
    if recipe["lora"] is not None:
        return f"Fine-tuned weights{of}: a LoRA adapter of rank {recipe['lora']['r']}, merged into them."
    if recipe["model"]["weights"] == "random":
        return f"A model of the shape{of or ' of its config'}, trained from random weights."
    return f"Fine-tuned weights{of}."


def _figures(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    rate, seconds = figures.get("tokens_per_second"), figures["seconds"]
    found = [
        ("steps", f"{figures['steps']:,}"),
        ("tokens", f"{figures['tokens']:,}, {figures['label_tokens']:,} of them with loss"),
        ("parameters that trained", f"{figures['trained_parameters']:,}"),
        ("last training loss", "" if figures["loss"] is None else f"{figures['loss']:.4f}"),
        ("time in steps", f"{seconds:,.1f} s"),
        ("tokens a second", "" if rate is None else f"{rate:,.0f}"),
        ("peak memory of a process", f"{figures['peak_memory_gb']:.2f} GB"),
        ("hardware", f"{figures['processes']} x {figures['device']}"),
    ]
    return [(name, value) for name, value in found if value]


def _held_out(figures: Mapping[str, Any]) -> str:
    if not figures["validation"]:
        return ""
    before = figures.get("validation_at_start", {})
    rows = [
        f"| {name} | {f'{before[name]:.4f}' if name in before else ''} | {loss:.4f} |"
        for name, loss in figures["validation"].items()
    ]
    return "\n".join(["| held out | loss before | loss after |", "|---|---|---|", *rows, "", ""])


def _loading(folder: str, base: str | None, is_adapter: bool, recipe: Mapping[str, Any]) -> str:
    auto = "AutoModelForImageTextToText" if _has_images(recipe) else "AutoModelForCausalLM"
    if not is_adapter:
        return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{folder}")'
    kind = base or "the base model"
    return (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'model = PeftModel.from_pretrained({auto}.from_pretrained("{kind}"), "{folder}")'
    )


def _public(path: str) -> str | None:
    """A name that others know; None for a folder of this machine."""
    return {"demo:smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}.get(path) or (path if _is_on_hub(path) else None)


def _is_on_hub(path: str) -> bool:
    return (
        not is_demo(path) and path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()
    )


def _has_images(recipe: Mapping[str, Any]) -> bool:
    return recipe["data"]["kind"] in ("cord_v2", "rdr", "medpix", "llava", "image_chat", "captions", "mock_images")


def _shared(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what is of this machine, or said by leaving it out."""
    return {name: value for name, value in recipe.items() if value is not None and name != "output"}


def _version() -> str:
    packages = this_machine().packages
    others = ", ".join(f"{name} {packages[name]}" for name in PACKAGES if name in packages)
    return importlib.metadata.version("automodel-accel") + (f" ({others})" if others else "")
