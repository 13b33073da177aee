"""The plan and the report as a person reads them and as a machine does; meta models, and how long it takes."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import automodel_accel as accel
from automodel_accel.plan import all_patches
from tests.swap.compare import applied, assert_close, only, step
from tests.tiny import batch, shake, tiny

# apply on a meta model of the shapes of Llama 3 70B, in a fresh process
CLOCK = """
import sys, time, torch
torch.set_num_threads(1)
import automodel_accel as accel
from transformers import LlamaConfig, LlamaForCausalLM
shapes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=80, **shapes)).to(torch.bfloat16)
seconds = []
for _ in range(3):
    start = time.process_time()  # one thread: what the clock on the wall says where nothing else runs
    accel.apply(model)
    seconds.append(time.process_time() - start)
    assert sum(accel.report(model).places(fusion) for fusion in ("norm", "mlp", "loss")) == 242
    accel.revert(model)
print(*seconds)
"""


def big(layers: int = 80) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=layers, hidden_size=512, intermediate_size=1024, vocab_size=32000)
        )


def mixed() -> nn.Module:
    """A model with claims and refusals of several kinds."""
    model = tiny("gemma3_text", num_hidden_layers=3)
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    model.model.layers[2].input_layernorm = nn.LayerNorm(32)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"80 layers": big, "gemma3": lambda: tiny("gemma3_text"), "mixed": mixed}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("width", [80, 100, 118])
def test_tables_are_readable(make: Callable[[], nn.Module], width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is wider than the terminal, every word stands whole, and 80 layers take no more room than two."""
    monkeypatch.setenv("COLUMNS", str(width))
    model = make()
    plan = accel.plan(model)
    accel.apply(model)
    if not any(p.is_meta for p in model.parameters()):
        step(model, **batch())
        model(**batch()).logits.max()
    for text in (str(plan), str(accel.report(model))):
        assert max(map(len, text.splitlines())) <= width
        assert text.count("\n") < 90
        assert text == "\n".join(line.rstrip() for line in text.split("\n"))
        words = set(re.split(r"[\s,]+", text))
        for whole in (
            "model.layers.*.mlp",
            "model.norm",
            "lm_head",
            "linear_cross_entropy",
            "vocabulary",
            "torch",
            "weight",
        ):
            assert whole in words, f"{whole} is broken in\n{text}"
    assert ("Refused" in str(plan)) == bool(plan.refusals)


def test_plan_of_a_tiny_model() -> None:
    text = " ".join(str(accel.plan(tiny())).split())
    assert text.startswith("Plan for LlamaForCausalLM on ")
    assert "nothing is changed yet" in text


def test_report_counts_and_names() -> None:
    model = accel.apply(mixed())
    step(model, **batch())
    model(**batch()).logits.argmax(-1)
    report = accel.report(model)
    text = " ".join(str(report).split())
    assert text.startswith(f"Gemma3ForCausalLM: {len(report.applied)} places swapped and proved")
    assert "materialised logits (argmax x1) 1" in text
    assert "loss: by a kernel 2" in text
    assert report.materialised_logits == 1
    calls = report.counts.fused.copy()
    calls["norm"] += calls.pop("residual")  # norms that were computed together with the sum before them
    assert calls == {
        **{fusion: 2 * report.places(fusion) for fusion in ("norm", "mlp", "rope", "linear")},
        "attention": 2 * 3,
        "loss": 2,
    }


def test_json_of_plan_and_report() -> None:
    model = mixed()
    plan = json.loads(accel.plan(model).to_json())
    assert plan.keys() == {"model", "device", "claims", "refusals"}
    assert {claim["fusion"] for claim in plan["claims"]} == {
        *("norm", "mlp", "rope", "attention", "loss", "residual", "linear")
    }
    for claim in plan["claims"]:
        assert claim.keys() == {"fusion", "paths", "recognised_as", "dtype", "kernels", "why", "passed_over"}
        assert all(path == "" or model.get_submodule(path) for path in claim["paths"])
    assert all(refusal.keys() == {"fusion", "what", "reason", "remedy"} for refusal in plan["refusals"])
    step(accel.apply(model), **batch())
    report = json.loads(accel.report(model).to_json())
    assert report["applied"] == plan["claims"]
    assert report["refusals"] == plan["refusals"]
    assert report["materialised_logits"] == 0
    assert report["calls"]["loss"] == 1
    assert {proof["fusion"] for proof in report["proofs"]} == {
        *("norm", "mlp", "rope", "attention", "loss", "residual", "linear")
    }
    for proof in report["proofs"]:
        assert proof["refused"] is None
        assert 0 <= proof["share_of_allowed_error"] <= 1
        assert len(proof["proven"]) >= (1 if "MaskForm" in proof["kind"] else 2)
    json.dumps(report, allow_nan=False)


def test_report_of_a_failed_place_is_valid_json(monkeypatch: pytest.MonkeyPatch) -> None:
    import automodel_accel.kernels.rms_norm.eager as eager

    monkeypatch.setattr(eager, "forward", lambda *arguments: None)
    report = json.loads(
        accel.report(accel.apply(tiny(), **only("norm", "mlp", "loss"))).to_json(),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    assert {claim["fusion"] for claim in report["applied"]} == {"mlp", "loss"}
    assert len([refusal for refusal in report["refusals"] if refusal["fusion"] == "norm"]) == 5


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "t5"])
def test_planning_changes_nothing(name: str) -> None:
    model = tiny(name)
    expected = step(model, **batch())
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    bits = copy.deepcopy(model.state_dict())
    accel.plan(model)
    for module, was, attributes in before:
        assert type(module) is was
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[key] is value for key, value in attributes.items())
    assert all(torch.equal(bits[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, expected.gradients[key]) for key, p in model.named_parameters())
    with pytest.raises(ValueError, match="not applied"):
        accel.report(model)


def test_switched_off_fusions_are_not_planned() -> None:
    off = {patch.fusion: False for patch in all_patches()}
    plan = accel.plan(tiny("gpt_neox"), {**off, "loss": True})
    assert {claim.fusion for claim in plan.claims} == {"loss"}
    assert not plan.refusals
    report = accel.report(accel.apply(tiny(), off))
    assert not report.applied
    assert not report.refusals


def test_configs_that_mean_the_same() -> None:
    settings: list[Any] = [accel.AccelConfig(norm="torch", loss=False), {"norm": "torch", "loss": False}]
    plans = [accel.plan(tiny(), config).to_dict() for config in settings]
    plans.append(accel.plan(tiny(), norm="torch", loss=False).to_dict())
    plans.append(accel.plan(tiny(), accel.AccelConfig(norm="triton"), norm="torch", loss=False).to_dict())
    assert all(plan == plans[0] for plan in plans)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_a_meta_model_that_gets_its_weights_later(name: str) -> None:
    """Applied without a weight, then filled as from_pretrained fills it: vanilla's loss and gradients."""
    vanilla = tiny(name)
    with torch.device("meta"):
        model = type(vanilla)(vanilla.config)
    accel.apply(model)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(vanilla.state_dict())
    model.tie_weights()
    for (_, buffer), (_, wanted) in zip(model.named_buffers(), vanilla.named_buffers(), strict=True):
        buffer.copy_(wanted)
    assert_close(step(model.train(), **batch()), step(vanilla, **batch()))
    assert accel.report(model).materialised_logits == 0
    assert not accel.report(model).counts.passed_on


def test_a_meta_model_that_is_initialised_in_place() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny().config)
    accel.apply(model).to_empty(device="cpu")
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):
            module.__init__(model.config)
    model.init_weights()
    shake(model)
    model.train()
    assert_close(step(model, **batch()), step(accel.revert(copy.deepcopy(model)), **batch()))


def test_a_model_on_meta_plans_for_this_machine() -> None:
    plan = accel.plan(big(2))
    assert {device for claim in plan.claims for device in claim.choices} == {plan.facts.device}


def test_80_layers_take_less_than_two_seconds() -> None:
    done = subprocess.run([sys.executable, "-c", CLOCK], check=True, capture_output=True, text=True)
    seconds = list(map(float, done.stdout.split()))
    assert min(seconds) < 2.0, seconds


def test_report_of_a_wrapper_is_that_of_the_model() -> None:
    model = applied(tiny())

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    assert accel.report(Wrapper()) is accel.report(model)
    accel.revert(Wrapper())
    with pytest.raises(ValueError, match="not applied"):
        accel.report(model)
