"""Wrong adapters: refused with what came, what was expected and what to do, or left to PEFT; never computed otherwise than by PEFT."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import automodel_accel as accel
from automodel_accel.kernels.facts import this_machine
from automodel_accel.kernels.linear import KERNEL
from tests.budgets.layers import LINEARS
from tests.swap.compare import assert_close, assert_equal, step
from tests.tiny import batch, tiny

# Triton's interpreter takes seconds
IMPLEMENTATIONS = [
    pytest.param(one.name, marks=[pytest.mark.slow] if one.name == "triton" else []) for one in KERNEL.implementations
]
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}


def adapted(model: nn.Module, **config: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 4, "target_modules": LINEARS, "init_lora_weights": False, **config}
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).train()


def state(model: Any) -> tuple[Any, ...]:
    modules = {name: type(module) for name, module in model.named_modules()}
    return modules, {name: p.requires_grad for name, p in model.named_parameters()}, sorted(vars(model))


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (
            {"target_modules": r".*q_prj"},
            r"'\.\*q_prj' is a regular expression .* matches none, such as model.layers.0",
        ),
        ({"target_modules": "q_proj"}, r"the last names of linears are down_proj, .* Give last names as a list"),
        ({"target_modules": "(q_proj"}, r"'\(q_proj' is no regular expression: missing \)"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]},
            r"module to save 'lm_hed'\. Did you mean 'lm_head'",
        ),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_prj"]},
            r"target parameter 'mlp.experts.gate_up_prj'",
        ),
        ({"target_modules": ["q_proj"], "rank": 4}, r"unknown setting 'rank'"),
        ({"target_modules": []}, "No `target_modules` passed"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"'layers_to_transform': \[7\]"),
        (Path("adapter"), r"peft.PeftModel.from_pretrained\(model, folder\), and then applied"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict | Path) else "",
)
def test_a_name_that_matches_nothing(lora: Any, said: str) -> None:
    model = tiny()
    before = state(model)
    with pytest.raises(ValueError, match=said):
        accel.apply(model, lora=lora)
    assert state(model) == before


def test_a_parameter_of_experts_that_is_not_there() -> None:
    lora = {**EXPERTS, "target_parameters": ["mlp.experts.gate_up_prj"]}
    with pytest.raises(ValueError, match=r"Did you mean 'mlp.experts.gate_up_proj'\?"):
        accel.apply(tiny("qwen3_moe"), lora=lora)


@pytest.mark.parametrize(
    ("architecture", "lora", "said"),
    [
        (
            "llama",
            {"target_modules": r".*\.1\..*k_proj", "r": 17},
            r"rank 17 is larger than model.layers.1.*k_proj \(16 x 32\)",
        ),
        ("llama", {"target_modules": "all-linear", "r": 33}, r"rank 33 is larger than .*; expected at most 32"),
        ("llama", {"target_modules": None, "r": 33}, r"rank 33 is larger than"),
        (
            "llama",
            {"target_modules": ["k_proj"], "rank_pattern": {"1.self_attn.k_proj": 17}},
            r"layers.1.self_attn.k_proj",
        ),
        ("llama", {"target_modules": ["embed_tokens"], "r": 33}, r"model.embed_tokens \(32 x 97\)"),
        ("qwen3_moe", {**EXPERTS, "r": 33}, r"rank 33 is larger than"),
    ],
    ids=["regular expression", "all-linear", "PEFT's own targets", "rank_pattern", "embedding", "experts"],
)
def test_a_rank_larger_than_the_layer(architecture: str, lora: dict[str, Any], said: str) -> None:
    model = tiny(architecture)
    before = state(model)
    with pytest.raises(ValueError, match=said):
        accel.apply(model, lora=lora)
    assert state(model) == before


def test_the_largest_rank() -> None:
    accel.apply(tiny(), lora={"target_modules": ["k_proj"], "r": 16})


def test_peft_itself_takes_such_a_rank_and_so_does_apply() -> None:
    theirs = adapted(tiny(), r=40)
    ours = accel.apply(copy.deepcopy(theirs))
    assert_close(step(ours, **batch()), step(theirs, **batch()))


@pytest.mark.parametrize(
    ("architecture", "lora", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "post_attention_layernorm"]}, {}),  # PEFT stops halfway
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"norm": "te", "strict": True}),
        ("qwen3_moe", EXPERTS, {"norm": "te", "strict": True}),
    ],
    ids=["halfway", "refused", "refused with experts"],
)
def test_a_failure_leaves_no_trace(architecture: str, lora: dict[str, Any], settings: dict[str, Any]) -> None:
    """What trained before trains again, and the same adapters as ever can be added."""
    model = tiny(architecture, tie_word_embeddings=False)
    model.model.embed_tokens.weight.requires_grad_(False)
    before, expected = state(model), step(model, **batch())
    with pytest.raises(ValueError, match=r"not supported|transformer-engine"):
        accel.apply(model, lora=lora, **settings)
    assert state(model) == before
    assert_equal(step(model, **batch()), expected)
    accel.apply(model, lora={"target_modules": ["q_proj"]})
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_a_configuration_serves_another_model_too() -> None:
    config = peft.LoraConfig(target_modules=["*_proj"])
    accel.apply(tiny("phi3"), lora=config)
    assert config.target_modules == {"*_proj"}
    adapted_names = {
        name.split(".")[-4] for name, _ in accel.apply(tiny(), lora=config).named_parameters() if "lora_A" in name
    }
    assert adapted_names == set(LINEARS)


def test_adapters_are_made_where_the_base_is() -> None:
    """A model of which a layer is on another device."""
    model = tiny()
    model.model.layers[1].to("meta")
    ours = accel.apply(model, lora={"target_modules": LINEARS, "r": 2})
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            assert parameter.device.type == ("meta" if ".layers.1." in name else "cpu"), name


def test_an_adapter_on_another_device_than_its_base() -> None:
    """Nothing is computed without it, and once it is back all is as it was."""
    theirs = adapted(tiny())
    ours = accel.apply(copy.deepcopy(theirs))
    q = ours.get_base_model().model.layers[0].self_attn.q_proj
    kept = q.lora_A["default"].weight
    q.lora_A["default"].weight = nn.Parameter(kept.to("meta"))
    with pytest.raises(RuntimeError, match=r"on device|expected device"):
        step(ours, **batch())
    q.lora_A["default"].weight = kept
    assert_close(step(ours, **batch()), step(theirs, **batch()))


def replaced(weight: nn.Parameter) -> None:
    weight.data = weight.data * 1.5


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("change", [replaced, in_place], ids=lambda change: str(change.__name__))
def test_base_weights_that_train(change: Callable[[nn.Parameter], None], implementation: str) -> None:
    """Frozen, then training, then changed, then frozen again: each call computes with what the weight is."""
    if implementation == "triton" and not this_machine().triton_interpreter:
        pytest.skip("the model is on a CPU")
    theirs = adapted(tiny())
    ours = accel.apply(copy.deepcopy(theirs), linear=implementation)
    for wanted in (False, True, False):
        for model in (ours, theirs):
            for name, parameter in model.named_parameters():
                if "layers.0" in name and "base_layer" in name:
                    parameter.requires_grad_(wanted)
        found, expected = step(ours, **batch()), step(theirs, **batch())
        assert_close(found, expected)
        assert any("base_layer.weight" in name for name in found.gradients) == wanted
        for model in (ours, theirs):
            change(model.get_base_model().model.layers[0].self_attn.k_proj.base_layer.weight)
            change(model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight)
    assert_close(step(ours, **batch()), step(theirs, **batch()))
    loaded = {name: value * 0.5 for name, value in theirs.state_dict().items()}
    for model in (ours, theirs):
        model.load_state_dict(loaded)
    assert_close(step(ours, **batch()), step(theirs, **batch()))


def load(base: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True).train()


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    """PEFT refuses what does not fit; what it loads in part is what ours computes with."""
    adapted(tiny(hidden_size=48)).save_pretrained(tmp_path / "wide")
    adapted(tiny(num_hidden_layers=1)).save_pretrained(tmp_path / "short")
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(accel.apply(tiny()), tmp_path / "wide")
    with pytest.raises(ValueError, match="not found in the base model"):
        load(tiny("gpt_neox"), tmp_path / "short")
    torch.manual_seed(7)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        theirs = load(tiny(), tmp_path / "short")
    ours = accel.apply(copy.deepcopy(theirs))
    assert_close(step(ours, **batch()), step(theirs, **batch()))


@pytest.mark.parametrize("targets", ["all-linear", "*", "*.mlp.*"])
def test_a_pattern_leaves_out_linears_of_one_number(targets: str) -> None:
    """Qwen2-MoE's shared_expert_gate; named, it is refused, as before."""
    model = accel.apply(tiny("qwen2_moe"), lora={"r": 4, "target_modules": targets})
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert adapted
    assert not any("shared_expert_gate" in name for name in adapted)
    with pytest.raises(ValueError, match=r"rank 4 is larger than .*shared_expert_gate"):
        accel.apply(tiny("qwen2_moe"), lora={"r": 4, "target_modules": ["shared_expert_gate"]})
