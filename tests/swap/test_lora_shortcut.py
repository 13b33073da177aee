"""apply(model, lora=...): PEFT's adapters and ours in one line."""

import copy
from typing import Any

import peft
import pytest
import torch

import automodel_accel as accel
from tests.swap.compare import assert_close, step
from tests.tiny import batch, tiny


@pytest.mark.parametrize(
    ("targets", "linears"),
    [
        ("all-linear", 14),
        ("*_proj", 14),
        (["*_proj"], 14),
        (["[qv]_proj"], 4),
        (["model.layers.0.*.q_proj", "down_proj"], 3),
        (r".*\.1\..*\.[qk]_proj", 2),
        (["q_proj"], 2),
    ],
    ids=str,
)
def test_the_same_as_peft_and_then_apply(targets: Any, linears: int) -> None:
    model = tiny()
    original = copy.deepcopy(model)
    torch.manual_seed(0)
    ours = accel.apply(model, lora={"r": 4, "target_modules": targets, "init_lora_weights": False}).train()
    assert isinstance(ours, peft.PeftModel)
    assert ours.get_base_model() is model
    adapted = sorted(name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear))
    assert len(adapted) == linears
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=adapted, init_lora_weights=False)
    theirs = peft.get_peft_model(original, config).train()
    theirs.load_state_dict(ours.state_dict())
    assert_close(step(ours, **batch()), step(theirs, **batch()))
    assert accel.report(ours).counts.fused["linear"] > 0


def test_experts_by_target_parameters() -> None:
    config = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    for seed in (0, 1):
        model = tiny("qwen3_moe")
        torch.manual_seed(seed)
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config, init_lora_weights=False)).train()
        torch.manual_seed(seed)
        ours = accel.apply(model, lora=peft.LoraConfig(**config, init_lora_weights=False)).train()
        assert_close(step(ours, **batch()), step(theirs, **batch()))


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"target_modules": ["q_prj"]}, r"unknown target module 'q_prj'. Did you mean 'q_proj'\? Known: down_proj"),
        ({"target_modules": ["*_experts"]}, "unknown target module"),
        (
            {"target_modules": ["q_proj", "k_proj"], "r": 17},
            r"rank 17 is larger than .*k_proj \(16 x 32\); expected at most 16",
        ),
        ("q_proj", "lora is a str; expected a peft.LoraConfig"),
    ],
    ids=["misspelt", "wildcard", "rank", "type"],
)
def test_bad_input_leaves_the_model_as_it_was(lora: Any, said: str) -> None:
    model = tiny()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=said):
        accel.apply(model, lora=lora)
    with pytest.raises(ValueError, match="unknown setting"):
        accel.apply(model, lora={"target_modules": ["q_proj"]}, nrm="torch")
    with pytest.raises(accel.RefusedError):
        accel.apply(model, lora={"target_modules": ["q_proj"]}, norm="te", strict=True)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_adapters_upon_adapters_and_an_applied_model() -> None:
    model = accel.apply(tiny(), lora={"target_modules": ["q_proj"]})
    with pytest.raises(ValueError, match="already applied; call revert"):
        accel.apply(model, lora={"target_modules": ["q_proj"]})
    with pytest.raises(ValueError, match="has adapters already"):
        accel.apply(accel.revert(model), lora={"target_modules": ["q_proj"]})
