"""The drop-in classes: transformers' auto classes in all but the keyword `accel`."""

import inspect
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlavaConfig, PretrainedConfig

import automodel_accel as accel
from automodel_accel import models
from tests.swap.compare import assert_close, assert_equal, step
from tests.tiny import batch, tiny

CLASSES = [
    (models.AutoModelForCausalLM, transformers.AutoModelForCausalLM),
    (models.AutoModelForImageTextToText, transformers.AutoModelForImageTextToText),
]
BOTH = pytest.mark.parametrize(("ours", "theirs"), CLASSES, ids=["causal", "image-text"])
REMOTE = """
from transformers import LlamaForCausalLM

class Remote(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny llama."""
    folder = tmp_path_factory.mktemp("saved")
    tiny(tie_word_embeddings=False).save_pretrained(folder)
    return folder


def is_applied(model: Any) -> bool:
    """Whether a report leads from it."""
    return any("_accel_base" in vars(type(module)) for module in model.modules())


def test_loaded_and_applied(saved: Path) -> None:
    ours = models.AutoModelForCausalLM.from_pretrained(saved)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert accel.report(ours).places("loss") == 1
    assert not ours.training
    assert isinstance(ours, transformers.LlamaForCausalLM)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    expected = step(theirs.train(), **batch())
    assert_close(step(ours.train(), **batch()), expected)
    assert accel.report(ours).counts.fused["loss"] == 1
    assert accel.report(ours).plan.config == accel.AccelConfig()
    assert_equal(step(accel.revert(ours), **batch()), expected)


def test_settings(saved: Path) -> None:
    load = models.AutoModelForCausalLM.from_pretrained
    for wanted in (accel.AccelConfig(loss=False), {"loss": False}):
        report = accel.report(load(saved, accel=wanted))
        assert (report.places("loss"), report.places("norm")) == (0, 5)
    assert accel.report(load(saved, accel=True)).places("loss") == 1
    assert not is_applied(load(saved, accel=False))


@pytest.mark.parametrize("wrong", ["triton", 1, 0, ["loss"], {"lose": False}, {"loss": 3}, {"loss": "tritton"}])
def test_wrong_settings(saved: Path, wrong: Any) -> None:
    if isinstance(wrong, dict):
        match = {"lose": "lose.*loss", "loss": "loss=3|tritton.*triton"}[next(iter(wrong))]
    else:
        match = r"accel=.*: expected an AccelConfig, a dict of its fields, True, False or None"
    with pytest.raises(ValueError, match=match):
        models.AutoModelForCausalLM.from_pretrained(saved, accel=wrong)
    with pytest.raises(ValueError, match=match):
        models.AutoModelForImageTextToText.from_config(_config(models.AutoModelForImageTextToText), accel=wrong)


def test_wrong_settings_are_told_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="accel='yes'"):
        models.AutoModelForCausalLM.from_pretrained("there is no such folder", accel="yes")


def _config(auto: Any) -> PretrainedConfig:
    """A tiny llama, or a tiny llava around one."""
    text: Any = tiny().config
    if auto is models.AutoModelForCausalLM or auto is transformers.AutoModelForCausalLM:
        return text  # type: ignore[no-any-return]
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 16}
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=90)


@BOTH
def test_from_config(ours: Any, theirs: Any) -> None:
    found = []
    for auto in (ours, theirs):
        torch.manual_seed(0)
        found.append(auto.from_config(_config(auto), dtype=torch.float32).train())
    assert is_applied(found[0])
    assert not is_applied(found[1])
    assert type(found[0]).__name__ == type(found[1]).__name__
    assert_close(*(step(model, **batch()) for model in found))
    assert accel.report(found[0]).counts.fused["loss"] == 1
    assert not is_applied(ours.from_config(_config(ours), accel=False))


def test_built_on_meta_and_filled_later() -> None:
    """As loaders for sharded training do."""
    with torch.device("meta"):
        model = models.AutoModelForCausalLM.from_config(_config(models.AutoModelForCausalLM))
    filled = tiny().state_dict()
    model.load_state_dict(filled, assign=True)
    model.model.rotary_emb = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(model.config)
    assert_close(step(model.train(), **batch()), step(tiny(), **batch()))
    assert accel.report(model).counts.fused["loss"] == 1


def test_a_vision_language_model(tmp_path: Path) -> None:
    _, theirs = CLASSES[1]
    theirs.from_config(_config(theirs)).save_pretrained(tmp_path)
    inputs = batch()
    inputs["input_ids"][:, 2:6] = 90  # four patches of an image
    inputs["pixel_values"] = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = [auto.from_pretrained(tmp_path).train() for auto in CLASSES[1]]
    assert_close(*(step(model, **inputs) for model in found))
    report = accel.report(found[0])
    assert report.counts.fused["loss"] == 1
    assert any("vision" in path for claim in report.applied for path in claim.paths)


def test_loading_info(saved: Path) -> None:
    found = [auto.from_pretrained(saved, output_loading_info=True) for auto in CLASSES[0]]
    assert [type(pair) for pair in found] == [tuple, tuple]
    assert found[0][1] == found[1][1]
    assert is_applied(found[0][0])


def test_arguments_are_passed_on(saved: Path) -> None:
    config = LlamaConfig.from_pretrained(saved, attention_dropout=0.25)
    model = models.AutoModelForCausalLM.from_pretrained(
        saved, config=config, dtype=torch.bfloat16, attn_implementation="eager", device_map={"": "cpu"}
    )
    assert (model.dtype, model.config.attention_dropout) == (torch.bfloat16, 0.25)
    assert model.config._attn_implementation == "eager"
    assert "accel" not in model.config.to_dict()
    assert accel.report(model).places("loss") == 1


def test_offloaded_to_a_folder(saved: Path, tmp_path: Path) -> None:
    """accelerate's hooks replace forwards before `apply` could: refused there, with the words for it, and exact."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.1": "disk", "model.norm": "cpu"}
    model = models.AutoModelForCausalLM.from_pretrained(saved, device_map=places, offload_folder=tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).logits, plain(**batch()).logits)
    refusals = [str(refusal) for _, refusal in accel.report(model).refusals]
    assert any("forward was replaced on the instance by accelerate" in refusal for refusal in refusals)


def test_an_adapter_folder(saved: Path, tmp_path: Path) -> None:
    """transformers loads the base model and puts the adapter on, the head's too, before it is applied."""
    base = transformers.AutoModelForCausalLM.from_pretrained(saved)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path)
    found = [auto.from_pretrained(tmp_path).train() for auto in CLASSES[0]]
    assert "default" in found[0].peft_config
    for model in found:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
    steps = [step(model, **batch()) for model in found]
    assert_close(*steps)
    assert any("lm_head" in name for name in steps[0].gradients)
    assert accel.report(found[0]).counts.fused["loss"] == 1


def test_remote_code(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "remote_llama.py").write_text(REMOTE)
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "remote_llama.Remote"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = [auto.from_pretrained(tmp_path, trust_remote_code=True).train() for auto in CLASSES[0]]
    assert [type(model).__name__ for model in found] == ["Remote", "Remote"]
    assert type(found[0])._auto_class == "AutoModelForCausalLM"
    assert_close(*(step(model, **batch()) for model in found))
    assert accel.report(found[0]).counts.fused["loss"] == 1


@BOTH
def test_the_class_is_transformers_class(ours: Any, theirs: Any) -> None:
    assert issubclass(ours, theirs)
    assert (ours.__name__, ours.__doc__) == (theirs.__name__, theirs.__doc__)
    assert ours._model_mapping is theirs._model_mapping
    for name in ("from_pretrained", "from_config"):
        assert getattr(ours, name).__doc__.startswith(getattr(theirs, name).__doc__)
        assert "`accel`" in getattr(ours, name).__doc__
        assert "accel" in inspect.signature(getattr(ours, name)).parameters


@BOTH
def test_errors_are_transformers(ours: Any, theirs: Any) -> None:
    def told(call: Any) -> str:
        with pytest.raises((OSError, ValueError)) as caught:
            call()
        return f"{type(caught.value).__name__}: {caught.value}"

    for wrong in (
        lambda auto: auto(),
        lambda auto: auto.from_pretrained("there is no such folder"),
        lambda auto: auto.from_config(transformers.ViTConfig()),
    ):
        assert told(lambda wrong=wrong: wrong(ours)) == told(lambda wrong=wrong: wrong(theirs))


def test_a_registered_class_is_known_to_both_and_nothing_else_is() -> None:
    known = dict(transformers.AutoModelForCausalLM._model_mapping._extra_content)

    class OwnConfig(LlamaConfig):
        model_type = "own-llama"

    class OwnModel(transformers.LlamaForCausalLM):
        config_class = OwnConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = OwnConfig(**sizes, vocab_size=97)
    models.AutoModelForCausalLM.register(OwnConfig, OwnModel)
    try:
        assert type(transformers.AutoModelForCausalLM.from_config(config)) is OwnModel
        model = models.AutoModelForCausalLM.from_config(config)
        assert isinstance(model, OwnModel)
        assert is_applied(model)
    finally:
        del transformers.AutoModelForCausalLM._model_mapping._extra_content[OwnConfig]
    assert known == transformers.AutoModelForCausalLM._model_mapping._extra_content
    assert not is_applied(transformers.AutoModelForCausalLM.from_config(tiny().config))
