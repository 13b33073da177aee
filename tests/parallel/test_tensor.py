"""Tensor parallel over two processes; the checks are in tensor.py. And what is refused, in one."""

import copy
import json
from typing import Any

import peft
import pytest
import torch
from torch import nn

import automodel_accel as accel
from automodel_accel.parallel import tensor_proof, tensor_sequence, tensor_units
from automodel_accel.parallel.tensor_local import own_part, packed
from tests.day0.zoo import Type, Unbuildable, tiny_model
from tests.launching import launch
from tests.parallel.tensor import CASES, EXPERTS
from tests.tiny import tiny

WHOLE = {"packed gate and up": 2}  # so many things are not cut


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tensor")
    launch("tests.parallel.tensor", folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_computes_as_one_process(found: Any, case: str) -> None:
    check = found["cases"][case]
    assert check["far"] == {}
    assert check["names"] > 10
    assert check["cut"] > 4
    assert len(check["refused"]) == WHOLE.get(case, 0)
    if CASES[case].settings.get("loss", True):
        assert check["logits"] == 0


@pytest.mark.slow
def test_the_whole_model_is_still_there(found: Any) -> None:
    assert found["kept"]["same"]
    assert found["kept"]["off"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_parameters_that_other_modules_read(found: Any, name: str) -> None:
    """Its pooling head reads an attention's; or the whole model its embedding, which is not cut then."""
    assert found["images"][name]["loss"] < 1e-6
    assert found["images"][name]["far"] == {}
    is_read = any("the model reads its embedding without calling it" in no for no in found["images"][name]["refused"])
    assert is_read == (name == "gemma4")


@pytest.mark.slow
def test_ranks_draw_the_same_dropout(found: Any) -> None:
    assert found["seeds"] == 0


@pytest.mark.slow
def test_mistakes_are_seen(found: Any) -> None:
    for name, far in found["mutants"].items():
        assert far, name
    assert "loss" not in found["mutants"]["inputs are not copied"]
    assert "loss" not in found["mutants"]["gradients of shares are not summed"]


@pytest.mark.slow
def test_a_wrong_plan_is_found_before_anything_is_cut(found: Any) -> None:
    assert found["plans"]["roles"] == [f"model.layers.{layer}.self_attn" for layer in range(2)]
    assert found["plans"]["packing"] == [f"model.layers.{layer}.mlp" for layer in range(2)]


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (4, "model.layers.0.self_attn has 2 key-value heads, of which each rank needs the same number"),
        (8, "Mesh: tensor is 8"),
        (3, "Mesh: tensor is 3"),
    ],
)
def test_heads_that_do_not_divide(size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tensor_units.units_of(tiny(), size)


def test_heads_of_a_vision_tower_do_not_stop_the_rest() -> None:
    model: Any = tiny()
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(model.config)  # as of a tower
    attention.config.num_attention_heads = 3
    units, refusals = tensor_units.units_of(model, 2)
    assert "model.layers.0.self_attn" in [unit.path for unit in units]
    assert [str(no) for no in refusals] == [
        "model.layers.1.self_attn: it has 3 attention heads, which 2 ranks do not divide; it is computed whole on each rank"
    ]


def test_numbers_of_heads_by_layer() -> None:
    """Of some configurations they can be asked of a layer only."""
    try:
        model = tiny_model(Type("dots3_note_text", "causal")).model
    except Unbuildable:
        pytest.skip("this version of transformers has no such model")
    units, _ = tensor_units.units_of(model, 2)
    assert any(tensor_units.is_attention(unit.module) for unit in units)


def test_on_meta_nothing_unproved_is_cut() -> None:
    """OPT's attention looks as if it could be, and there is nothing to try it with; Llama's is in transformers' plan."""
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32}
    models = [tiny("opt", **sizes).to("meta"), tiny("llama").to("meta")]
    attentions = [[unit.path for unit in tensor_units.units_of(m, 2)[0] if "attn" in unit.path] for m in models]
    assert attentions == [[], ["model.layers.0.self_attn", "model.layers.1.self_attn"]]


def test_linears_that_are_stored_otherwise_are_left() -> None:
    model = accel.apply(tiny("gpt2", n_inner=48, activation_function="gelu"))
    _, refusals = tensor_units.units_of(model, 2)
    assert any("c_fc is a Conv1D, which computes with sizes of the whole" in str(no) for no in refusals)


def test_what_nothing_speaks_of_is_said() -> None:
    """A part of a layer that is neither cut nor refused."""
    model: Any = tiny()
    units, refusals = tensor_units.units_of(model, 2)
    layers = list(model.model.layers)
    assert list(tensor_units.left_whole(model, units, refusals, layers)) == []
    left = tensor_units.left_whole(model, [unit for unit in units if "mlp" not in unit.path], refusals, layers)
    assert [no.what for no in left] == ["model.layers.0.mlp", "model.layers.1.mlp"]


class Mixing(nn.Module):
    """Adds to each token what the one before it has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * x.roll(1, dims=1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tokens_are_split_where_units_alone_mix_them(device: str) -> None:
    model: Any = tiny("qwen3_moe", **EXPERTS).to(device)
    layers, units = list(model.model.layers), tensor_units.units_of(model, 2)[0]
    tensor_sequence.check(model, layers, units)
    experts_only = [unit for unit in units if unit.path.endswith("experts")]
    with pytest.raises(ValueError, match=r"in or after model.layers.0 of this Qwen3MoeForCausalLM they"):
        tensor_sequence.check(model, layers, experts_only)


def test_tokens_are_not_split_where_anything_else_mixes_them() -> None:
    model: Any = tiny()
    layers, units = list(model.model.layers), tensor_units.units_of(model, 2)[0]
    layers[1].post_attention_layernorm = Mixing()
    with pytest.raises(ValueError, match=r"in or after model.layers.1 of this LlamaForCausalLM they see each other"):
        tensor_sequence.check(model, layers, units)
    assert not any("forward" in vars(module) for module in model.modules())


def test_on_meta_tokens_are_not_split_where_something_is_left_whole() -> None:
    model: Any = tiny().to("meta")
    layers, units = list(model.model.layers), tensor_units.units_of(model, 2)[0]
    layers[1].mixer = nn.Linear(4, 4, device="meta")
    with pytest.raises(ValueError, match=r"in or after model.layers.1 of this LlamaForCausalLM"):
        tensor_sequence.check(model, layers, units)


def test_tokens_are_not_split_where_layers_do_not_follow_one_another() -> None:
    model: Any = tiny(num_hidden_layers=3)
    layers, units = list(model.model.layers), tensor_units.units_of(model, 2)[0]
    with pytest.raises(ValueError, match=r"in or after model.layers.0 of this LlamaForCausalLM"):
        tensor_sequence.check(model, layers[::2], [unit for unit in units if "layers.1." not in unit.path])


def test_dora_is_refused() -> None:
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"the adapter of q_proj is a DoraLinear.*; expected plain LoRA"):
        tensor_units.units_of(model, 2)


def test_quantised_weights_are_refused() -> None:
    model = tiny()
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(torch.zeros(linear.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"the weight of up_proj is torch.int8; expected one that is not quantised"):
        tensor_units.units_of(model, 2)


def test_packed_parts() -> None:
    """Each rank has its part of the gate, then its part of up."""
    weight = torch.arange(8.0)[:, None]
    assert own_part(weight, packed(0), 0, 2)[:, 0].tolist() == [0, 1, 4, 5]
    assert own_part(weight, packed(0), 1, 2)[:, 0].tolist() == [2, 3, 6, 7]


def test_what_no_part_can_compute_stays_whole() -> None:
    """OPT's attention puts its own number of heads into a view, where a part has fewer."""
    model = tiny("opt", ffn_dim=48, word_embed_proj_dim=32)
    units, _ = tensor_units.units_of(model, 2)
    reasons = tensor_proof.disprove(model, units, 2)
    assert sorted(reasons) == [f"model.decoder.layers.{layer}.self_attn" for layer in range(2)]
    assert all("its 2 parts do not add up to the whole" in reason for reason in reasons.values())
