"""The builder of tiny models itself: what it builds is the same each time, learns, and sees."""

import json

import pytest
import torch
from transformers import LlamaConfig, Qwen3NextConfig

from automodel_accel.recipes.tiny.building import ATTEMPTS, BUILD_ERRORS
from automodel_accel.recipes.tiny.exceptions import EXCEPTIONS
from automodel_accel.recipes.tiny.images import LAYOUTS
from automodel_accel.recipes.tiny.shrink import Rules, shrink
from tests.day0 import zoo
from tests.day0.census import Entry, count
from tests.day0.zoo import Type, Unbuildable, find_way, remembered, tiny_model, train, types

LLAMA, GEMMA3, QWEN = Type("llama", "causal"), Type("gemma3", "vlm"), Type("qwen3_vl", "vlm")
SEEING = (
    GEMMA3,
    QWEN,
    Type("llava", "vlm"),
    Type("idefics3", "vlm"),
    Type("pix2struct", "vlm"),
    Type("kosmos-2", "vlm"),
)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("type", [LLAMA, QWEN], ids=str)
def test_the_seed_decides_weights_and_batch(type: Type) -> None:
    one, same_seed, other_seed = tiny_model(type), tiny_model(type), tiny_model(type, seed=1)
    assert same(one.model.state_dict(), same_seed.model.state_dict())
    assert not same(one.model.state_dict(), other_seed.model.state_dict())
    assert same(one.batch(), same_seed.batch())
    assert not same(one.batch(), one.batch(seed=1))


def test_building_draws_no_random_number() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    tiny_model(LLAMA).batch()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("type", [LLAMA, GEMMA3], ids=str)
def test_a_batch_has_the_rows_tokens_and_ignored_labels_asked_for(type: Type) -> None:
    tiny = tiny_model(type)
    batch = tiny.batch(rows=3, tokens=7, ignored=4)
    images = tiny.image.tokens if tiny.image else 0
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 7 + images)
    assert ((batch["labels"] == -100).sum(1) == 4 + images).all()


@pytest.mark.parametrize("type", SEEING, ids=str)
def test_the_pixels_reach_the_loss(type: Type) -> None:
    tiny = tiny_model(type)
    assert tiny.has_image
    batch = tiny.batch()
    pixels = batch["flattened_patches" if "flattened_patches" in batch else "pixel_values"].requires_grad_()
    train(tiny.model, batch)
    assert pixels.grad is not None
    assert pixels.grad.any()


def test_vectors_are_random_and_dropout_is_off() -> None:
    model = tiny_model(Type("bert", "causal")).model
    assert model.training
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    assert vectors
    assert all(vector.std() > 0.01 for vector in vectors)


def test_the_dtype_asked_for() -> None:
    tiny = tiny_model(GEMMA3, dtype=torch.bfloat16)
    assert tiny.model.dtype == tiny.batch()["pixel_values"].dtype == torch.bfloat16


def test_shrinking_keeps_what_makes_a_model_hard() -> None:
    llama = shrink(LlamaConfig(num_attention_heads=32, num_key_value_heads=8), Rules())
    assert (llama.num_attention_heads, llama.num_key_value_heads) == (4, 2)
    hybrid = Qwen3NextConfig()
    assert set(shrink(hybrid, Rules()).layer_types) == set(hybrid.layer_types)


def test_what_cannot_be_trained_says_why() -> None:
    with pytest.raises(Unbuildable, match="must be"):
        find_way(Type("gemma4_assistant", "causal"))


def test_a_forgotten_type_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known = tiny_model(Type("qwen2_vl", "vlm"))
    monkeypatch.setattr(zoo, "remembered", dict)
    found = tiny_model(Type("qwen2_vl", "vlm"))
    assert found.image == known.image
    assert same(found.model.state_dict(), known.model.state_dict())


def test_a_model_without_loss_or_with_infinite_gradients_is_none() -> None:
    tiny = tiny_model(LLAMA)
    text = tiny.batch()
    with pytest.raises(ValueError, match="no loss"):
        train(tiny.model, {"input_ids": text["input_ids"]})
    with torch.no_grad():
        next(tiny.model.parameters()).fill_(float("inf"))
    with pytest.raises(BUILD_ERRORS):
        train(tiny.model, text)


def test_what_is_remembered_is_of_known_types_attempts_and_layouts() -> None:
    stored = json.loads(zoo.REMEMBERED.read_text(encoding="utf-8"))["types"]
    named = {str(type) for kind in ("causal", "vlm") for type in types(kind)}
    if remembered():
        assert stored.keys() == named
    ways = [found for found in stored.values() if not isinstance(found, str)]
    assert all(found.get("attempt", 0) < len(ATTEMPTS) for found in ways)
    assert all(found["image"]["layout"] in LAYOUTS for found in ways if "image" in found)


def test_exceptions_are_few_and_documented() -> None:
    assert len(EXCEPTIONS) <= 8
    assert all(quirk.__doc__ for quirk in EXCEPTIONS.values())


def test_counting() -> None:
    entries = [Entry(LLAMA, True, False, ""), Entry(GEMMA3, True, True, ""), Entry(QWEN, False, False, "why")]
    assert count(entries) == {"causal": 1, "vlm": 1, "image": 1}
