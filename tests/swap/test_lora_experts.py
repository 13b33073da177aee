"""Adapters on the stacked weights of experts, by PEFT's target_parameters: PEFT computes those, and all else stays fused."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import automodel_accel as accel
from tests.loops import runs
from tests.loops.runs import Feature
from tests.swap.compare import assert_close, step
from tests.tiny import batch, tiny

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
WEIGHTS = {"one": ["mlp.experts.gate_up_proj"], "both": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
PASSED_ON = "experts: a module inside was replaced or given hooks, or its weights are made by an adapter"


def pair(weights: str, architecture: str = "qwen3_moe") -> tuple[Any, Any]:
    """Ours by `lora=`, and PEFT's alone, with the same adapters."""
    config = {"r": 2, "target_modules": ATTENTION, "target_parameters": WEIGHTS[weights], "init_lora_weights": False}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny(architecture), peft.LoraConfig(**config)).train()
    torch.manual_seed(0)
    ours = accel.apply(tiny(architecture), lora=config).train()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    return ours, theirs


def of_experts(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if "experts" in name and p.requires_grad}


@pytest.mark.parametrize(("weights", "architecture"), [("one", "qwen3_moe"), ("both", "mixtral")])
def test_eight_steps_as_by_peft(weights: str, architecture: str, tmp_path: Path) -> None:
    ours, theirs = pair(weights, architecture)
    first = step(ours, **batch())
    assert_close(first, step(theirs, **batch()))
    assert len(of_experts(ours)) == 2 * 2 * len(WEIGHTS[weights])
    assert of_experts(ours) <= first.gradients.keys()
    done, vanilla = (runs.run(runs.plain, model, Feature(), tmp_path) for model in (ours, theirs))
    runs.assert_same(done, vanilla)
    assert accel.report(ours).counts.fused["linear"] == 2 * 2 * (1 + runs.MICRO_BATCHES)


def test_the_report_says_what_is_fused_and_what_is_pefts() -> None:
    ours, _ = pair("both")
    step(ours, **batch())
    report = accel.report(ours)
    assert report.counts.passed_on == {PASSED_ON: 2}
    assert report.counts.fused["experts"] == 0
    assert report.counts.fused["linear"] == 2 * 2
    assert "are made by an adapter: by the original" in " ".join(str(report).split())


def test_merged_unmerged_switched_off_and_reverted() -> None:
    ours, theirs = pair("both")
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(**batch()).loss, theirs(**batch()).loss)
    for model in (ours, theirs):
        model.merge_adapter()
    torch.testing.assert_close(ours(**batch()).loss, theirs(**batch()).loss)
    for model in (ours, theirs):
        model.unmerge_adapter()
    assert_close(step(ours, **batch()), step(theirs, **batch()))
    plain = tiny("qwen3_moe")
    plain.load_state_dict(copy.deepcopy(ours).merge_and_unload().state_dict())
    torch.testing.assert_close(plain(**batch()).loss, theirs(**batch()).loss, rtol=1e-5, atol=1e-5)
    assert_close(step(accel.revert(ours), **batch()), step(theirs, **batch()))


def test_saved_by_ours_and_loaded_by_peft(tmp_path: Path) -> None:
    ours, theirs = pair("both")
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / name)
    saved = [peft.load_peft_weights(str(tmp_path / name)) for name in ("ours", "theirs")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    loaded = peft.PeftModel.from_pretrained(tiny("qwen3_moe"), str(tmp_path / "ours"), is_trainable=True).train()
    again = accel.apply(copy.deepcopy(loaded))
    expected = step(theirs, **batch())
    for model in (loaded, again):
        assert_close(step(model, **batch()), expected)
