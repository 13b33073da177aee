"""The text of a batch: token numbers, labels, and what else a forward asks of text."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from automodel_accel.recipes.tiny.configuration import is_size

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


def text_batch(model: PreTrainedModel, rows: int, tokens: int, ignored: int, seed: int) -> dict[str, Any]:
    """Token numbers and labels, the first `ignored` of each row -100, and what else the forward asks of text."""
    generator = torch.Generator().manual_seed(seed)
    asked = inspect.signature(model.forward).parameters
    vocabulary = _vocabulary(model.config)
    shape = (rows, tokens)
    input_ids = torch.randint(min(200, vocabulary // 2), vocabulary, shape, generator=generator)
    labels = input_ids.clone()
    labels[:, :ignored] = -100
    batch = {"input_ids": input_ids, "labels": labels}
    if "attention_mask" in asked:
        batch["attention_mask"] = torch.ones_like(input_ids)
    for name in TOKEN_TYPES:
        if name in asked and model.config.get_text_config() is not model.config:
            batch[name] = torch.zeros_like(input_ids)
    if "bbox" in asked:
        batch["bbox"] = torch.randint(0, 100, (*shape, 4), generator=generator).sort(-1).values
    codebooks = getattr(getattr(model.config, "decoder", model.config), "num_codebooks", None)
    if is_size(codebooks) and codebooks > 1:  # music: a row for each codebook, labels of all of them
        return {
            "input_ids": input_ids.repeat_interleave(codebooks, 0),
            "labels": labels[..., None].repeat(1, 1, codebooks),
        }
    return batch


def _vocabulary(config: PreTrainedConfig) -> int:
    text = config.get_text_config(decoder=True) if config.is_encoder_decoder else config.get_text_config()
    sizes = [getattr(each, "vocab_size", None) for each in (text, config)]
    return next((size for size in sizes if is_size(size)), 256)
