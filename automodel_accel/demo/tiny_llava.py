"""A tiny LLaVA of random weights, 0.5 million: a CLIP vision tower, a projector and a Llama, for the words of easy-vqa."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from automodel_accel.demo import easy_vqa
from automodel_accel.demo.cache import made_once

SEED = 0
SIDE, PATCH, WIDTH = 64, 16, 96  # pixels of a picture's side and of a patch's; features of a token
DEVIATION = 0.1  # of the weights; with the usual 0.02, too small for so few features, the loss of 200 steps takes 1000
# an image, the words of the question, and the answer up to the token that ends it
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }} "
    "{% endfor %}{{ '<eos>' if message.role == 'assistant' else '' }}{% endfor %}"
)


def folder() -> Path:
    """Model and processor, as save_pretrained writes them.

    Raises:
        ValueError: easy-vqa is not installed, whose words the tokenizer knows.
    """
    rows = easy_vqa.folder() / "train.json"

    def write(made: Path) -> None:
        processor = build_processor(rows)
        processor.save_pretrained(made)
        build_model(processor).save_pretrained(made)

    # whoever changes this file, or has other rows, gets another folder
    origin = Path(__file__).read_text(encoding="utf-8") + easy_vqa.folder().name
    return made_once(f"tiny-llava-{easy_vqa.hash_of(origin):x}", write)


def build_processor(rows: Path) -> Any:
    """A word is a token: every word of the training rows."""
    said = [turn["value"] for row in json.loads(rows.read_text(encoding="utf-8")) for turn in row["conversations"]]
    words = sorted({word for text in said for word in text.removeprefix("<image>\n").replace("?", " ?").split()})
    known = {word: number for number, word in enumerate(["<pad>", "<image>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    made: Any = transformers
    fast = made.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"},
        extra_special_tokens={"image_token": "<image>"},
    )
    images = made.CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    return made.LlavaProcessor(
        *(images, fast),
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
    )


def build_model(processor: Any) -> Any:
    """Drawn from SEED, whatever was drawn before."""
    made: Any = transformers
    vision = made.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH},
        initializer_range=DEVIATION,
    )
    text = made.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
        vocab_size=len(processor.tokenizer),
        initializer_range=DEVIATION,
    )
    config = made.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return made.LlavaForConditionalGeneration(config)
