"""A tokenizer of three words, for libraries that load no model without one; the benchmarks never call it."""

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2}


def save(folder: str) -> None:
    """Write it beside a model."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
