"""Batches go through the models of their families: a row says the same alone and beside others, with and without images."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from automodel_accel.data.vision_collate import IGNORED, VisionCollate
from tests.data.test_vision_collate import MIXED, ONE, SEVERAL, build

TEXT: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"bos_token_id": 1, "eos_token_id": 2},
}
VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 32, "patch_size": 8},
}
Words = Callable[[str], int]


def _qwen2_vl(token: Words) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def _gemma3(token: Words) -> Any:
    return transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_id=token("<image_soft_token>"),
        boi_token_id=token("<boi>"),
        eoi_token_id=token("<eoi>"),
    )


def _idefics3(token: Words) -> Any:
    text = {**TEXT, "model_type": "llama"}
    return transformers.Idefics3Config(
        text_config=text, vision_config=VISION, scale_factor=2, image_token_id=token("<image>")
    )


def _paligemma(token: Words) -> Any:
    return transformers.PaliGemmaConfig(
        text_config={**TEXT, "head_dim": 8, "model_type": "gemma"},
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        image_token_index=token("<image>"),
        projection_dim=32,
    )


CONFIGS = {"qwen2_vl": _qwen2_vl, "gemma3": _gemma3, "idefics3": _idefics3, "paligemma": _paligemma}


def losses(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of each label, by row."""
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return [row[its != IGNORED] for row, its in zip(each, labels)]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_row_says_the_same_alone_and_beside_others(family: str) -> None:
    processor = build(family)
    config = CONFIGS[family](processor.tokenizer.convert_tokens_to_ids)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        config
    ).train()  # PaliGemma's prefix is seen in training
    collate = VisionCollate(processor)
    for chats in (ONE, SEVERAL) if family == "paligemma" else (ONE, SEVERAL, MIXED):
        together = losses(model, collate(chats))
        alone = [losses(model, collate([chat]))[0] for chat in chats]
        assert len(together[0]) > 3
        torch.testing.assert_close(together, alone)
