"""Freezing by part: found without a name, checked by which parameters a picture's gradient reaches."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

import automodel_accel as accel
from automodel_accel.freezing import PARTS, Freezing, find_parts, freeze, lora_exclusion, summary
from automodel_accel.recipes.tiny.text import text_batch
from tests.day0.zoo import Type, tiny_model
from tests.tiny import tiny

# one a shape: a projector beside the tower, within it, at the top, deep stacks, loose parameters, another name for everything
SHAPES = (
    "llava",
    "llava_next",
    "qwen2_vl",
    "qwen3_vl",
    "idefics3",
    "llama4",
    "lighton_ocr",
    "t5gemma2",
    "paddleocr_vl",
)
VISION = ("vision_tower", "projector")


def vlm(name: str) -> Any:
    return tiny_model(Type(name, "vlm"))


def reached(model: nn.Module, batch: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that the loss reaches."""
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return {name for name, one in model.named_parameters() if one.grad is not None and one.grad.any()}


@pytest.mark.parametrize("name", SHAPES)
def test_tower_and_projector_are_what_only_a_picture_reaches(name: str) -> None:
    made = vlm(name)
    with_picture = reached(made.model, made.batch())
    of_pictures = with_picture - reached(made.model, text_batch(made.model, 2, 24, 5, 0))
    parts = find_parts(made.model)
    assert of_pictures
    assert {one for one in with_picture if parts.part_of(one) in VISION} == of_pictures
    for part in VISION:
        assert any(parts.part_of(one) == part for one in of_pictures)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "fuyu", "janus"])
def test_the_parts_make_up_the_model(name: str) -> None:
    model = vlm(name).model
    found = summary(model)
    assert sum(one.total for one in found.counts.values()) == sum(one.numel() for one in model.parameters())
    assert found.trainable == sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert str(found).splitlines()[-1].startswith("all")


@pytest.mark.parametrize("part", ["vision_tower", "projector", "embeddings", "language_model"])
def test_one_part_is_frozen_and_learns_nothing(part: str) -> None:
    made = vlm("llava")
    parts = find_parts(made.model)
    names = {name: parts.part_of(name) for name, _ in made.model.named_parameters()}
    found = freeze(made.model, part)
    frozen = {part, "embeddings"} if part == "language_model" else {part}
    assert {name for name, one in made.model.named_parameters() if not one.requires_grad} == {
        name for name, its in names.items() if its in frozen
    }
    assert {its for its, count in found.counts.items() if count.trainable == 0} == frozen
    assert not {name for name in reached(made.model, made.batch()) if names[name] in frozen}


def test_a_part_that_does_not_exist_is_an_error_that_names_those_that_do() -> None:
    model = vlm("llava").model
    with pytest.raises(
        ValueError, match=r"no audio_tower: .*sound. It has: vision_tower, projector, embeddings, language_model"
    ):
        freeze(model, "vision_tower", "audio_tower")
    assert all(one.requires_grad for one in model.parameters())
    with pytest.raises(ValueError, match=r"unknown part 'vision'. Did you mean 'vision_tower'"):
        freeze(model, "vision")
    with pytest.raises(
        ValueError, match=r"no projector: the model takes text alone. It has: embeddings, language_model"
    ):
        freeze(tiny(), "projector")


def test_what_cannot_be_told_apart_is_refused() -> None:
    """Its layers, its image encoder and the projection between lie side by side in one module."""
    model = vlm("git").model
    assert {"vision_tower", "embeddings"} == set(find_parts(model).names)
    for part in ("projector", "language_model"):
        with pytest.raises(ValueError, match=f"no {part}: .*not told apart"):
            freeze(model, part)
    freeze(model, "vision_tower")


def test_audio_is_a_part_of_its_own() -> None:
    model = vlm("qwen2_5_omni_thinker").model
    parts = find_parts(model)
    assert set(parts.names) == set(PARTS)
    freeze(model, "audio_tower")
    assert {name.split(".")[1] for name, one in model.named_parameters() if not one.requires_grad} == {"audio_tower"}


def test_tied_embeddings_freeze_the_head() -> None:
    model = tiny(tie_word_embeddings=True)
    freeze(model, "embeddings")
    assert not model.lm_head.weight.requires_grad
    assert "embeddings" in summary(model).counts


@pytest.mark.parametrize("first", [True, False], ids=["before LoRA", "after LoRA"])
def test_lora_goes_only_where_nothing_is_frozen(first: bool) -> None:
    model = vlm("llava").model
    excluded = lora_exclusion(model, *VISION)
    if first:
        freeze(model, *VISION)
    config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=excluded)
    adapted = peft.get_peft_model(model, config)
    if not first:
        freeze(adapted, *VISION)
    trained = [name for name, one in adapted.named_parameters() if one.requires_grad]
    assert trained
    assert all("language_model" in name and "lora_" in name for name in trained)


def test_adapters_in_a_frozen_part_are_frozen() -> None:
    adapted = peft.get_peft_model(vlm("llava").model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert any("vision_tower" in name for name, one in adapted.named_parameters() if one.requires_grad)
    found = freeze(adapted, "vision_tower")
    assert found.counts["vision_tower"].trainable == 0
    assert found.counts["language_model"].trainable > 0


def test_a_recipe_names_parts_by_their_keys() -> None:
    assert Freezing(vision_tower=True, embeddings=True).parts() == ("vision_tower", "embeddings")
    assert Freezing().parts() == ()
    assert tuple(Freezing.__dataclass_fields__) == PARTS


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_the_parts_are_found_in_an_accelerated_model(name: str) -> None:
    model = vlm(name).model
    before = find_parts(model)
    accel.apply(model)
    assert accel.report(model).applied
    assert find_parts(model) == before
