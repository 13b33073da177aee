"""Tiny models of real architectures, with weights that betray a wrong swap."""

from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

VOCABULARY = 97
TOKENS = 24
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_T5_SIZES: dict[str, Any] = {
    **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY},
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
_BART_SIZES: dict[str, Any] = {
    "d_model": 32,
    **{"encoder_layers": 1, "encoder_ffn_dim": 48, "encoder_attention_heads": 4},
    **{"decoder_layers": 1, "decoder_ffn_dim": 48, "decoder_attention_heads": 4},
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
# what makes each architecture worth a test, beyond its defaults
_SPECIAL: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}
_NO_DROPOUT = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "dropout": 0.0,
    "dropout_rate": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "activation_dropout": 0.0,
}
_CLASSES: dict[str, Any] = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM}

# causal model -> how many places of each fusion there are to swap
CAUSAL: dict[str, dict[str, int]] = {
    "llama": {"norm": 5, "mlp": 2, "rope": 2, "loss": 1},
    "mistral": {"norm": 5, "mlp": 2, "rope": 2, "loss": 1},
    "qwen3": {"norm": 9, "mlp": 2, "rope": 2, "loss": 1},
    "gemma3_text": {"norm": 13, "mlp": 2, "rope": 2, "loss": 1},
    "gemma2": {"norm": 9, "mlp": 2, "rope": 2, "loss": 1},
    "phi3": {"norm": 5, "mlp": 2, "rope": 2, "loss": 1},
    "gpt_neox": {"norm": 5, "mlp": 2, "rope": 2, "loss": 1},
    "cohere": {"norm": 3, "mlp": 2, "rope": 2, "loss": 1},
    "granite": {"norm": 5, "mlp": 2, "rope": 2, "loss": 1},
}
OTHERS: dict[str, dict[str, int]] = {
    "bert": {"norm": 6, "mlp": 0, "loss": 1},
    "t5": {"norm": 12, "mlp": 4, "loss": 1},
    "bart": {"norm": 7, "mlp": 0, "loss": 1},
}


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A model of two layers and 97 words, the same each time, in training mode.

    The vectors (norms' weights and biases) are random, so that a kernel that mistakes w for 1 + w, or drops a bias, shows.
    """
    sizes = {"t5": _T5_SIZES, "bart": _BART_SIZES}.get(name, _SIZES)
    special = _SPECIAL.get(name, {})
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = CONFIG_MAPPING[name](**{**sizes, **_NO_DROPOUT, **special, **tokens, **config})
    torch.manual_seed(0)
    model: PreTrainedModel = _CLASSES.get(name, AutoModelForCausalLM).from_config(settings)
    shake(model)
    return model.to(dtype).train()


def shake(model: nn.Module) -> None:
    """Add noise to every vector of parameters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def batch(rows: int = 2, tokens: int = TOKENS, ignored: int = 5) -> dict[str, torch.Tensor]:
    """Token numbers and labels; the first labels of each row are ignored."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    labels = input_ids.clone()
    labels[:, :ignored] = -100
    return {"input_ids": input_ids, "labels": labels}
