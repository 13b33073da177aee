"""Attention: the same loss and gradients, a config and a model that are left as they were, and calls that are not ours."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import automodel_accel as accel
from automodel_accel.kernels.attention import measure
from automodel_accel.patches.attention_masks import LazyMask
from tests.swap.compare import applied, assert_as_good, assert_close, assert_equal, others_off, step
from tests.tiny import TOKENS, batch, tiny

# model -> what is special about its attention
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 7},
    "mistral": {"sliding_window": 5},
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 4},
    "gpt_neox": {},
    "cohere": {},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v3": {
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
        **{"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
    },
}
ONLY: dict[str, Any] = others_off("attention")
EAGER = {"attn_implementation": "eager"}


def model_of(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    return tiny(name, dtype, **{**MODELS.get(name, {}), **config})


def served(model: Any) -> int:
    """Calls of attention that took our path; every other call is an error."""
    counts = accel.report(model).counts
    assert not counts.passed_on
    return counts.fused["attention"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eager", [False, True], ids=["its own choice", "eager"])
def test_loss_and_every_gradient(name: str, eager: bool) -> None:
    model = model_of(name, **(EAGER if eager else {}))
    ours = applied(model, **ONLY)
    assert_close(step(ours, **batch()), step(model, **batch()))
    assert served(ours) == 2


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_near_to_the_truth(name: str) -> None:
    model = model_of(name, torch.bfloat16)
    ours = applied(model, **ONLY)
    truth = step(copy.deepcopy(model).float(), **batch())
    assert_as_good(step(ours, **batch()), step(model, **batch()), truth, torch.bfloat16)
    assert served(ours) == 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_under_torch_compile(name: str) -> None:
    torch._dynamo.reset()
    model = model_of(name, use_cache=False)
    ours = applied(model, **ONLY)
    expected = step(model, **batch())
    ours.forward = torch.compile(ours.forward, backend="aot_eager")
    assert_close(step(ours, **batch()), expected)
    torch._dynamo.reset()


def test_autocast() -> None:
    model = model_of("llama")
    ours = applied(model, **ONLY)
    truth = step(model, **batch())
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (step(m, **batch()) for m in (ours, model))
    assert_as_good(mine, theirs, truth, torch.bfloat16)
    assert served(ours) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = model_of("gemma2")
    ours = applied(model, **ONLY)
    for m in (model, ours):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(step(ours, **batch()), step(model, **batch()))
    assert served(ours) == 4


def _padded(left: bool) -> dict[str, Any]:
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, : 5 if left else None] = 0 if left else 1
    mask[1, -3:] = 1 if left else 0
    inputs["labels"][mask == 0] = -100
    return {**inputs, "attention_mask": mask}


ROWS: dict[str, dict[str, Any]] = {
    "padded on the left": _padded(left=True),
    "padded on the right": _padded(left=False),
    "a mask of ones": {**batch(), "attention_mask": torch.ones(2, TOKENS, dtype=torch.long)},
    "later positions": {**batch(), "position_ids": torch.arange(3, 3 + TOKENS)[None]},
    "positions backwards": {**batch(), "position_ids": torch.arange(TOKENS).flip(0)[None], "use_cache": True},
    "no cache": {**batch(), "use_cache": False},
    "a mask of its own": {**batch(), "attention_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]},
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_rows_that_are_not_packed(name: str, row: str) -> None:
    inputs = ROWS[row]
    if name == "gpt_oss" and row == "a mask of its own":
        mask = torch.zeros(TOKENS, TOKENS).masked_fill(~inputs["attention_mask"][0, 0], -1e30)[None, None]
        inputs = {**inputs, "attention_mask": mask}
    model = model_of(name)
    ours = applied(model, **ONLY)
    assert_close(step(ours, **inputs), step(model, **inputs))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(name: str, cache: str) -> None:
    model = model_of(name).eval()
    ours = applied(model, **ONLY)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "cache_implementation": cache}
    settings |= {"disable_compile": True} if cache == "static" else {}
    prompt = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours.generate(prompt, **settings), model.generate(prompt, **settings))


def test_attention_weights_come_from_the_original() -> None:
    model = model_of("llama", **EAGER).eval()
    ours = applied(model, **ONLY)
    mine, theirs = (m(batch()["input_ids"], output_attentions=True).attentions for m in (ours, model))
    assert len(mine) == 2
    assert all(map(torch.equal, mine, theirs))
    assert accel.report(ours).counts.passed_on["attention: the attention weights are wanted"] == 2
    assert ours(batch()["input_ids"]).logits.isfinite().all()
    assert accel.report(ours).counts.fused["attention"] == 2


def test_dropout_goes_to_the_original() -> None:
    model = model_of("llama", attention_dropout=0.5)
    ours = applied(model, **ONLY)
    torch.manual_seed(3)
    theirs = step(model, **batch())
    torch.manual_seed(3)
    assert_equal(step(ours, **batch()), theirs)
    assert accel.report(ours).counts.passed_on == {"attention: dropout": 2}


def test_an_unknown_keyword_goes_to_the_original() -> None:
    model = model_of("llama", use_cache=False)
    ours = applied(model, **ONLY)
    assert_equal(
        step(ours, **batch(), something_new=torch.ones(1)), step(model, **batch(), something_new=torch.ones(1))
    )
    assert accel.report(ours).counts.passed_on == {"attention: the keyword 'something_new'": 2}


def test_context_parallelism_finds_its_function_called(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = applied(model_of("llama"), **ONLY)
    real, called = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or real(*a, **k))
    step(ours, **batch())
    assert len(called) == 2


def test_a_later_choice_of_the_user_wins() -> None:
    model = model_of("llama")
    ours = applied(model, **ONLY)
    for m in (model, ours):
        m.set_attn_implementation("eager")
    assert_equal(step(ours, **batch()), step(model, **batch()))
    assert accel.report(ours).counts.passed_on["attention: the implementation is 'eager' now"] == 2
    ours.set_attn_implementation("sdpa")
    step(ours, **batch())
    assert accel.report(ours).counts.fused["attention"] == 2


def test_another_implementation_is_refused() -> None:
    ours = model_of("llama")
    ours.set_attn_implementation("flex_attention")
    reasons = [no.reason for fusion, no in accel.plan(ours, **ONLY).refusals if fusion == "attention"]
    assert "its attention implementation is 'flex_attention', expected 'sdpa' or 'eager'" in reasons


def test_the_config_is_not_touched() -> None:
    model = model_of("gemma2")
    before, kind, shared = model.config.to_dict(), type(model.config), model.config
    other = AutoModelForCausalLM.from_config(shared)
    applied_in_place = accel.apply(model, **ONLY)
    assert applied_in_place.config is shared
    assert (model.config.to_dict(), type(model.config)) == (before, kind)
    assert all(module.config is shared for module in model.modules() if hasattr(module, "config"))
    step(other.train(), **batch())  # a model of the same config object is nobody's business
    assert accel.report(model).counts.fused.total() == 0
    assert type(AutoModelForCausalLM.from_config(model.config)) is type(other)


def test_two_models_of_one_config_do_not_influence_each_other() -> None:
    one, two = model_of("llama"), model_of("llama")
    two.config = one.config
    expected = step(two, **batch())
    accel.apply(one, **ONLY)
    assert_equal(step(two, **batch()), expected)
    accel.apply(two, **ONLY)
    accel.revert(one)
    step(two, **batch())
    assert served(two) == 2


def test_revert_is_bit_exact() -> None:
    model = model_of("gemma3_text")
    expected, classes = step(model, **batch()), [type(module) for module in model.modules()]
    accel.apply(model, **ONLY)
    step(model, **batch())
    accel.revert(model)
    assert [type(module) for module in model.modules()] == classes
    assert_equal(step(model, **batch()), expected)


def test_copies_and_pickles() -> None:
    model = model_of("gemma2")
    ours = accel.apply(copy.deepcopy(model), **ONLY)
    clone = copy.deepcopy(ours)
    loaded = pickle.loads(pickle.dumps(ours))
    expected = step(model, **batch())
    assert_close(step(clone, **batch()), expected)
    assert accel.report(ours).counts.fused["attention"] == 2
    assert_equal(step(loaded, **batch()), expected)
    accel.revert(clone)
    assert_equal(step(clone, **batch()), expected)


def test_a_failed_proof_leaves_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    from automodel_accel.patches import attention_call

    real = attention_call.attention
    monkeypatch.setattr(attention_call, "attention", lambda *a, **k: real(*a, **k) * 1.01)
    model = model_of("llama")
    ours = applied(model, **ONLY)
    assert not [claim for claim in accel.report(ours).applied if claim.part == "attention"]
    assert_close(step(ours, **batch()), step(model, **batch()))


def test_a_lazy_mask_is_the_dense_one_to_whoever_looks() -> None:
    dense = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    made = []
    mask = LazyMask(None, None, (1, 1, 4, 4), lambda: made.append(1) or dense)
    assert mask[:, :, :, :4] is mask
    assert (mask.ndim, mask.dim(), mask.size(-1), tuple(mask.shape)) == (4, 4, 4, (1, 1, 4, 4))
    assert not made
    assert torch.equal(mask[..., :2], dense[..., :2])
    assert torch.equal(~mask, ~dense)
    assert torch.equal(torch.where(mask, 1.0, 0.0), dense.float())
    assert mask.dtype == torch.bool
    assert torch.equal(mask.to(torch.float32), dense.float())
    assert torch.equal(copy.deepcopy(mask), dense)
    assert torch.equal(pickle.loads(pickle.dumps(mask)), dense)
    assert len(made) == 1
    with pytest.raises(AttributeError, match="a tensor has no attribute 'nonsense'"):
        _ = mask.nonsense


def test_a_measurement_inside_a_checkpoint_is_no_part_of_it() -> None:
    """The first call of a kind is timed; a checkpoint around it would see tensors that it never sees again."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    kind = measure.Kind(torch.device("cpu"), torch.float32, 1, (8, 8), 128, True, frozenset())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        measure.fastest.__wrapped__(kind, ("sdpa", "torch"))
    assert not kept
