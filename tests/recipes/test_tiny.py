"""Tiny models: the type by name, config or cache; what they keep of the large one; that they train."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from automodel_accel.recipes.tiny import UnknownModel, find_type, tiny, tiny_config, tiny_model
from automodel_accel.recipes.tiny.names import type_of_name, words
from automodel_accel.recipes.tiny.searching import train

TYPES = list(CONFIG_MAPPING.keys())
# names as they are on the hub, and the types of their configs there
NAMED = {
    "meta-llama/Llama-3.2-1B": "llama",
    "meta-llama/Llama-3.2-11B-Vision": "mllama",
    "meta-llama/Llama-4-Scout-17B-16E": "llama4",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2",
    "Qwen/Qwen1.5-MoE-A2.7B": "qwen2_moe",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-0.6B": "qwen3",
    "Qwen/Qwen3-30B-A3B": "qwen3_moe",
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "qwen3_next",
    "Qwen/Qwen3-VL-30B-A3B-Instruct": "qwen3_vl_moe",
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": "qwen3_omni_moe",
    "Qwen/Qwen3.5-27B": "qwen3_5",
    "Qwen/Qwen3.5-35B-A3B": "qwen3_5_moe",
    "google/gemma-2b": "gemma",
    "google/gemma-2-2b": "gemma2",
    "google/gemma-3-270m": "gemma3_text",
    "google/gemma-3-4b-it": "gemma3",
    "google/gemma-3n-e4b-it": "gemma3n",
    "mistralai/Mistral-7B-v0.1": "mistral",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral",
    "mistralai/Ministral-3-3B-Instruct-2512": "mistral3",
    "microsoft/phi-2": "phi",
    "microsoft/phi-4": "phi3",
    "microsoft/Phi-4-multimodal-instruct": "phi4_multimodal",
    "deepseek-ai/DeepSeek-V3": "deepseek_v3",
    "zai-org/GLM-4.5-Air": "glm4_moe",
    "zai-org/GLM-4.7-Flash": "glm4_moe_lite",
    "openai/gpt-oss-20b": "gpt_oss",
    "openai-community/gpt2": "gpt2",
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": "nemotron_h",
    "nvidia/Llama-3.1-Nemotron-Nano-8B-v1": "llama",
    "tiiuae/Falcon3-7B-Instruct": "llama",
    "tiiuae/Falcon-H1-7B-Instruct": "falcon_h1",
    "baidu/ERNIE-4.5-21B-A3B-PT": "ernie4_5_moe",
    "allenai/OLMo-2-0425-1B-Instruct": "olmo2",
    "EleutherAI/pythia-160m": "gpt_neox",
    "/data/checkpoints/Qwen3-0.6B/": "qwen3",
}


@pytest.mark.parametrize(("name", "expected"), NAMED.items(), ids=NAMED)
def test_a_name_says_the_type(name: str, expected: str) -> None:
    assert type_of_name(name, TYPES) == expected


def test_a_size_is_one_word() -> None:
    assert words("Qwen3-30B-A3B") == ["qwen", "3", "30b", "a3b"]
    assert words("gemma-2b") == ["gemma", "2b"]
    assert words("gemma2") == ["gemma", "2"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("someone/qwem-3-7b", "no type of transformers goes by that name. Near it are .*qwen3"),
        ("moonshotai/Kimi-K9-Mini", "Near it are kimi_k25, kimi_linear"),
        ("nvidia/Nemotron-Flash-1B", "its type is 'nemotron_flash', which transformers .* does not have"),
        ("google-t5/t5-small", "no class of type 't5' for causal_lm; it is trained from sequence to sequence"),
        ("mistralai/Ministral-3-3B-Instruct-2512", "it has one for image_text_to_text; set model.task"),
    ],
)
def test_an_unknown_model_says_what_is_near(name: str, expected: str) -> None:
    with pytest.raises(UnknownModel, match=expected):
        find_type(name)


def folder_of(path: Path, **settings: object) -> str:
    (path / "config.json").write_text(json.dumps(settings))
    return str(path)


def test_a_local_config_keeps_what_is_no_size(tmp_path: Path) -> None:
    path = folder_of(
        tmp_path,
        model_type="gemma2",
        hidden_size=2304,
        num_hidden_layers=26,
        vocab_size=256000,
        final_logit_softcapping=12.5,
        attn_logit_softcapping=None,
        query_pre_attn_scalar=224,
        tie_word_embeddings=False,
        quantization_config={"quant_method": "fp8"},
    )
    config = tiny_config(path)
    assert find_type(path).where == "its config.json"
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 2, 256)
    assert (config.final_logit_softcapping, config.query_pre_attn_scalar) == (12.5, 224)
    assert config.tie_word_embeddings is False
    assert not hasattr(config, "quantization_config")


def test_without_a_config_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"config\.json"):
        find_type(str(tmp_path))


def test_a_type_of_nobody_is_said_as_such(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="nobody_has_this"):
        find_type(folder_of(tmp_path, model_type="nobody_has_this"))


def test_the_cache_of_the_hub_comes_before_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(name: str, **kwargs: object) -> PretrainedConfig:
        assert kwargs == {"local_files_only": True}
        return CONFIG_MAPPING["qwen3"](tie_word_embeddings=True)

    monkeypatch.setattr(AutoConfig, "from_pretrained", cached)
    found = find_type("meta-llama/Llama-3.2-1B")
    assert (found.type.name, found.where) == ("qwen3", "the cache of the hub")
    assert tiny_config("meta-llama/Llama-3.2-1B").tie_word_embeddings is True


@pytest.mark.parametrize(
    ("name", "task", "feature"),
    [
        ("Qwen/Qwen3-30B-A3B", "causal_lm", "num_experts"),
        ("google/gemma-3-4b-it", "image_text_to_text", "vision_config"),
        ("google/gemma-2-9b-it", "causal_lm", "final_logit_softcapping"),
    ],
)
def test_keeps_what_makes_a_model_hard(name: str, task: str, feature: str) -> None:
    made = tiny(find_type(name, task).type)
    assert getattr(made.model.config, feature)
    assert sum(one.numel() for one in made.model.parameters()) < 2e6
    assert made.has_image == (task == "image_text_to_text")
    train(made.model, made.batch())


def test_the_seed_decides_and_meta_has_no_weights() -> None:
    one, same, other = tiny_model("qwen3"), tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    weights = [model.get_input_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert all(one.is_meta for one in tiny_model("qwen3", device="meta").parameters())
