"""FLOPs of a training step by a model's modules, against torch's own counter and against the count by shape."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config

from automodel_accel.flops import attended_pairs, training_flops, vendor_peak
from bench.e2e.flops import causal_pairs, step_flops
from bench.e2e.shapes import shape_of
from tests.tiny import TOKENS, batch, tiny

ROWS = 2


def _full(model: Any) -> Any:
    return model


def _lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def _two_adapters(model: Any) -> Any:
    model = _lora(model)
    model.add_adapter("other", LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def _trained_head(model: Any) -> Any:
    adapter = LoraConfig(r=4, target_modules=["up_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return get_peft_model(model, adapter)


def _upper_half(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.dim() == 2 and ("layers.1" in name or name == "lm_head.weight"))
    return model


def _counted(model: nn.Module) -> int:
    """By torch, of linears and of attention between all pairs; the angles of rotary embeddings are products of matrices too."""
    with FlopCounterMode(display=False) as counter:
        model(**batch(rows=ROWS), use_cache=False).loss.backward()
    counts = counter.get_flop_counts()
    angles = sum(sum(found.values()) for name, found in counts.items() if name.split(".")[-1] == "rotary_emb")
    return int(counter.get_total_flops() - angles)


def _expected(model: nn.Module) -> float:
    flops = training_flops(model)
    assert flops is not None
    return flops.total(ROWS * TOKENS, dict.fromkeys(flops.per_pair, ROWS * TOKENS**2))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gpt2", "phi3", "gemma2", "cohere"])
def test_full_training_costs_what_torch_counts(name: str) -> None:
    model = tiny(name, attn_implementation="eager")
    assert _expected(model) == _counted(model)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_of_the_experts_those_count_that_serve_a_token(name: str) -> None:
    sizes = {"num_local_experts": 6, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    model = tiny(name, attn_implementation="eager", experts_implementation="eager", **sizes)
    assert _expected(model) == _counted(model)
    dense = sum(2 * 3 * ROWS * TOKENS * p.numel() for p in model.parameters() if p.dim() == 3)
    assert dense > _counted(model)


HIDDEN, KEYS, RANK = 32, 2 * 8, 4
FIRST_KEYS_AND_VALUES = 2 * ROWS * TOKENS * HIDDEN * 2 * KEYS
THEIR_ADAPTERS = 2 * ROWS * TOKENS * HIDDEN * 2 * RANK
BACKWARD_OF_ATTENTION = 8 * ROWS * TOKENS**2 * HIDDEN


@pytest.mark.parametrize(
    ("prepare", "spared"),
    [
        (_lora, FIRST_KEYS_AND_VALUES + THEIR_ADAPTERS),
        (_two_adapters, FIRST_KEYS_AND_VALUES + THEIR_ADAPTERS),
        (_trained_head, BACKWARD_OF_ATTENTION),
        (_upper_half, FIRST_KEYS_AND_VALUES + BACKWARD_OF_ATTENTION),
    ],
    ids=["lora", "one of two adapters", "modules_to_save", "upper half"],
)
def test_frozen_weights_have_no_gradient_and_adapters_two(prepare: Callable[[Any], Any], spared: int) -> None:
    """Exact but for what torch spares where gradients end: inputs of the first k and v, and attention below the first weight."""
    model = prepare(tiny(attn_implementation="eager", tie_word_embeddings=False))
    assert _expected(model) == _counted(model) + spared


@pytest.mark.parametrize("method", ["full", "lora"])
def test_agrees_with_the_count_by_shape(method: str) -> None:
    shape, tokens, rank = shape_of("Llama-3.2-1B"), 4096, 16
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    flops, pairs = training_flops(model), causal_pairs([tokens])
    assert flops is not None
    assert flops.total(tokens, {None: pairs}) == pytest.approx(
        step_flops(shape, tokens, pairs, method, rank).total, rel=0.01
    )


def test_a_vision_tower_sees_no_tokens() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97}
    config = Gemma3Config(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 14})
    with torch.device("meta"):
        whole: Any = AutoModelForImageTextToText.from_config(config)
        language: Any = AutoModelForCausalLM.from_config(config.get_text_config())
    both = training_flops(whole), training_flops(language)
    assert both[0] is not None
    assert both[1] is not None
    assert both[0].per_pair == both[1].per_pair
    projector = whole.model.multi_modal_projector.mm_input_projection_weight.numel()
    assert both[0].per_token == both[1].per_token + 4 * projector


def test_what_cannot_be_said_per_token_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_flops(tiny("t5")) is None
    assert training_flops(nn.Linear(3, 4)) is None
    monkeypatch.setattr("automodel_accel.flops.EXPERTS_OF_A_TOKEN", ())
    assert training_flops(tiny("mixtral", num_local_experts=4)) is None


def test_layers_of_two_windows_are_counted_apart() -> None:
    flops = training_flops(tiny("gemma2", sliding_window=7))
    assert flops is not None
    assert flops.per_pair == {7: 12 * 4 * 8, None: 12 * 4 * 8}
    assert training_flops(tiny("mamba", state_size=4)).per_pair == {}  # type: ignore[union-attr]


@pytest.mark.parametrize("window", [None, 3, 100])
def test_pairs_are_the_ones_in_the_mask(window: int | None) -> None:
    lengths, width = (3, 1, 5), 6
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    distance = torch.arange(9)[:, None] - torch.arange(9)[None, :]
    near = (distance >= 0) & (distance < (window or 99))
    expected = int(((document[:, None] == document[None, :]) & near).sum())
    packed = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
    assert int(attended_pairs(packed, window)) == expected
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    assert int(attended_pairs({"attention_mask": mask}, window)) == expected
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    assert int(attended_pairs({"attention_mask": mask, "position_ids": positions}, window)) == expected
    unmasked = {"input_ids": torch.zeros(2, 5).long()}
    assert attended_pairs(unmasked, window) == int(attended_pairs({"attention_mask": torch.ones(2, 5)}, window))


def test_peaks_are_of_16_bits_and_of_listed_devices() -> None:
    assert vendor_peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert vendor_peak("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert vendor_peak("NVIDIA H100 80GB HBM3", "float32") is None
    assert vendor_peak("CPU", "bfloat16") is None


def test_a_quantised_weight_counts_as_the_linear_that_it_is() -> None:
    model = tiny()
    before = training_flops(model)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    after = training_flops(model)
    assert before is not None
    assert after == replace(before, per_token=before.per_token - 2 * layer.in_features * layer.out_features)
