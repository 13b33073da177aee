"""PEFT's LoRA around the 4-bit and 8-bit linears of bitsandbytes: as right as PEFT alone, or handed to PEFT."""

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import automodel_accel as accel
from automodel_accel.kernels.facts import this_machine
from automodel_accel.kernels.numerics import judge
from tests.budgets.layers import LINEARS as ALL
from tests.budgets.watch import Watch
from tests.swap.bnb_models import of_library, quantised, truth_of
from tests.swap.compare import assert_as_good, assert_close, assert_equal, step
from tests.swap.test_lora import NAMES, Model, adapted, assert_equal_outcomes, outcome
from tests.tiny import batch, tiny

BITS = (4, 8)
# of blocks of 64 weights, as the library takes them
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def assert_as_peft(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, autocast: torch.dtype | None = None) -> None:
    """By the error ratio: all results in one dtype, each in units of its largest element."""
    exact = outcome(truth_of(theirs), x.double())
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        found, expected = outcome(ours, x), outcome(theirs, x)
    assert found.keys() == expected.keys() == exact.keys()
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
    for dtype in {tensor.dtype for tensor in expected.values()}:
        names = [name for name, tensor in expected.items() if tensor.dtype is dtype]
        # a power of 2: no rounding of its own
        units = {name: 2.0 ** exact[name].abs().max().clamp_min(1e-30).log2().ceil().item() for name in names}
        parts = (
            torch.cat([(some[name] / units[name]).flatten() for name in names]) for some in (found, expected, exact)
        )
        verdict = judge(*parts)
        assert verdict.passed, f"{dtype}: {verdict}"


def only_quantised(model: nn.Module, fused: int) -> None:
    counts = accel.report(model).counts
    assert counts.fused["quantised"] == fused
    assert [reason for reason in counts.passed_on if reason.startswith("quantised")] == []


def moderate(model: nn.Module, rank: int, dtype: torch.dtype) -> nn.Module:
    """Adapters that add something of the order of the output, in one dtype."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn_like(parameter, dtype=torch.float32) / rank).to(dtype)
    return model


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from(BITS),
    double=st.booleans(),
    rank=st.sampled_from([1, 2, 3, 8, 16, 64, 256]),
    sizes=st.sampled_from([(64, 64), (64, 96), (128, 32)]),
    targets=st.sets(st.sampled_from(NAMES), min_size=1).map(sorted),
    low=st.sampled_from([torch.float32, torch.bfloat16]),
    wide_adapters=st.booleans(),
    rslora=st.booleans(),
    alpha=st.sampled_from([1, 3, 16, 32]),
    bias=st.booleans(),
)
def test_equal_to_peft(
    bits: int,
    double: bool,
    rank: int,
    sizes: tuple[int, int],
    targets: list[str],
    low: torch.dtype,
    wide_adapters: bool,
    rslora: bool,
    alpha: int,
    bias: bool,
) -> None:
    torch.manual_seed(0)
    model = quantised(Model(*sizes, bias=bias).to(low), bits, double, low)
    theirs = adapted(model, r=rank, target_modules=targets, use_rslora=rslora, lora_alpha=alpha)
    moderate(theirs, rank, torch.float32 if wide_adapters else low)
    ours = accel.apply(copy.deepcopy(theirs), quantised=True, strict=True)
    assert_as_peft(ours, theirs, torch.randn(20, 7, sizes[0], generator=torch.Generator().manual_seed(2)).to(low))
    shared = sum(name in targets for name in NAMES[:3])
    only_quantised(ours, (shared > 0) + ("o_proj" in targets))


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_under_autocast(bits: int, x_type: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = moderate(adapted(quantised(Model(64, 96), bits, compute=torch.bfloat16)), 4, torch.float32)
    ours = accel.apply(copy.deepcopy(theirs))
    assert_as_peft(ours, theirs, torch.randn(20, 7, 64).to(x_type), autocast=torch.bfloat16)
    only_quantised(ours, 2)


def test_two_narrow_dtypes_go_to_peft() -> None:
    theirs = adapted(quantised(Model(64, 96).bfloat16(), 4, compute=torch.bfloat16))
    ours = accel.apply(copy.deepcopy(theirs))
    x = torch.randn(3, 64).bfloat16()
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(ours.layer.q_proj(x), theirs.layer.q_proj(x))
    (reason,) = accel.report(ours).counts.passed_on
    assert "torch.bfloat16 under autocast to torch.float16" in reason


@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("bits", BITS)
def test_dropout_draws_what_peft_draws(bits: int, p: float) -> None:
    theirs = adapted(quantised(Model(64, 96), bits), lora_dropout=p)
    ours = accel.apply(copy.deepcopy(theirs))
    x = torch.randn(4, 6, 64)
    for seed in range(2):
        found, expected = outcome(ours, x, seed), outcome(theirs, x, seed)
        after = torch.rand(())
        outcome(ours, x, seed)
        assert torch.rand(()) == after, "the random numbers go on elsewhere than after PEFT"
        largest = max(tensor.abs().max().item() for tensor in expected.values())
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6 * largest, msg=name)
    only_quantised(ours, 4 * 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as it lies on a disk."""
    path = tmp_path_factory.mktemp("llama")
    tiny(**SIZES).save_pretrained(path)
    return path


def loaded(folder: Path, bits: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """As transformers loads it quantised, and PEFT prepares it."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = {**four, "bnb_4bit_compute_dtype": dtype} if bits == 4 else {"load_in_8bit": True}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**config), dtype=dtype)
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-any-return]


def lora(**config: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ALL, "init_lora_weights": False, **config})


def with_peft(folder: Path, bits: int, **config: Any) -> nn.Module:
    torch.manual_seed(1)
    return peft.get_peft_model(loaded(folder, bits), lora(**config)).train()


@pytest.mark.parametrize("recompute", [None, "selective"])
@pytest.mark.parametrize("bits", BITS)
def test_twenty_steps_give_the_losses_of_peft(folder: Path, bits: int, recompute: str | None) -> None:
    curves = []
    for ours in (False, True):
        model, config = loaded(folder, bits), lora(lora_dropout=0.1, init_lora_weights=True)
        torch.manual_seed(1)
        if ours:
            config.target_modules = "*_proj"
            model = accel.apply(model, lora=config, recompute=recompute).train()
        else:
            model = peft.get_peft_model(model, config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(0)
        losses = []
        for i in range(20):
            loss = model(**batch(ignored=5 + i % 3)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    vanilla, fused = curves
    assert fused == pytest.approx(vanilla, rel=1e-5)
    assert fused[-1] < fused[0]
    counts = accel.report(model).counts
    assert (counts.fused["quantised"], counts.fused["mlp"]) == (20 * 2 * 4, 20 * 2)
    assert counts.passed_on == {}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_checkpointing(folder: Path, bits: int, reentrant: bool) -> None:
    """By the error ratio, also against PEFT without checkpoints in float64."""
    theirs = with_peft(folder, bits, lora_dropout=0.2)
    truth = truth_of(theirs)
    ours = copy.deepcopy(theirs)
    for model in (ours, theirs):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    accel.apply(ours, recompute="selective")
    steps = []
    for model in (ours, theirs, truth):
        torch.manual_seed(3)
        steps.append(step(model, **batch(), use_cache=False))
    assert_as_good(*steps, torch.float32)
    only_quantised(ours, (1 if reentrant else 2) * 2 * 4)  # again in backward; first without gradients, where reentrant


@pytest.mark.parametrize("bits", BITS)
def test_plan_evaluation_and_revert(folder: Path, bits: int) -> None:
    theirs = with_peft(folder, bits)
    ours = copy.deepcopy(theirs)
    classes = {name: type(module) for name, module in ours.named_modules()}
    accel.apply(ours, recompute="selective")
    labels = {claim.label for claim in accel.report(ours).applied if claim.fusion == "quantised"}
    again = ", the input computed again in backward, where that is cheap" if bits == 4 else ""
    groups = ("q_proj, k_proj, v_proj of one input, ", "gate_proj, up_proj of one input, ", "")
    assert labels == {f"{group}LoRA on {bits}-bit{again}" for group in groups}
    assert accel.report(ours).places("mlp") == 2
    assert_close(step(ours, **batch()), step(theirs, **batch()))
    only_quantised(ours, 2 * 4)
    for model in (ours, theirs):
        model.eval()
    ours_alone = accel.apply(
        accel.revert(ours), **dict.fromkeys(("norm", "mlp", "rope", "attention", "residual"), False)
    )
    assert torch.equal(ours_alone(**batch()).logits, theirs(**batch()).logits)
    assert accel.report(ours).counts.fused["quantised"] == 0
    accel.revert(ours)
    assert {name: type(module) for name, module in ours.named_modules()} == classes
    assert_equal(step(ours.train(), **batch()), step(theirs.train(), **batch()))


def saved_bytes(model: nn.Module, *args: Any, **inputs: Any) -> int:
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        model(*args, **inputs)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_less_is_kept_and_fewer_kernels_run_than_by_peft(bits: int, low: torch.dtype, p: float) -> None:
    """Adapters in float32. Without dropout PEFT keeps nothing more only where the input is in float32 as well."""
    theirs = adapted(quantised(Model(64, 96).to(low), bits, compute=low), lora_dropout=p)
    moderate(theirs, 4, torch.float32)
    ours = accel.apply(copy.deepcopy(theirs))
    x = torch.randn(40, 64).to(low).requires_grad_()
    launches, kept = [], []
    for model in (ours, theirs):
        model(x).sum().backward()  # what is built once is not counted
        model.zero_grad()
        with Watch() as watch:
            model(x).sum().backward()
        launches.append(len(watch.launches))
        kept.append(saved_bytes(model, x))
    assert launches[0] < launches[1]
    assert kept[0] < kept[1] or (kept[0] == kept[1] and low is torch.float32 and not p)
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5 - p
    assert saved_bytes(ours, x) == kept[0], "what is kept depends on dropout"


@pytest.mark.parametrize("bits", BITS)
def test_selective_recompute_keeps_no_input_of_a_4_bit_linear(folder: Path, bits: int) -> None:
    """Outputs of two norms and of the activation; the library keeps the input of an 8-bit linear itself.

    Nothing trains before the very first norm, so that its input is kept for that reason alone.
    """
    kept = []
    for recompute in (None, "selective"):
        model = accel.apply(with_peft(folder, bits, lora_dropout=0.1), recompute=recompute)
        model(**batch())  # what is built once is not counted
        kept.append(saved_bytes(model, **batch()))
    tokens, layers = batch()["input_ids"].numel(), 2
    inputs = tokens * ((2 * layers - 1) * SIZES["hidden_size"] + layers * SIZES["intermediate_size"]) * 4
    assert kept[0] - kept[1] == (inputs if bits == 4 else 0)


def dora(model: nn.Module) -> nn.Module:
    return adapted(model, use_dora=True)


def two_adapters(model: nn.Module) -> nn.Module:
    model = adapted(model)
    config = peft.LoraConfig(r=2, target_modules=list(NAMES), init_lora_weights=False)
    peft.inject_adapter_in_model(config, model, adapter_name="other")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(["default", "other"])
    return model.train()


def with_a_hook(model: nn.Module) -> nn.Module:
    model = adapted(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.base_layer.register_forward_hook(lambda module, args, output: output * 2)
    return model


def switched_off(model: nn.Module) -> nn.Module:
    model = adapted(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dora, "its adapter is a DoraLinearVariant"),
        (two_adapters, "2 adapters are active"),
        (with_a_hook, "there are hooks inside of it"),
        (switched_off, "its adapters are merged or switched off"),
    ],
)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_one_plain_adapter_is_left_to_peft(bits: int, make: Any, reason: str) -> None:
    torch.manual_seed(0)
    theirs = make(quantised(Model(64, 96, bias=True), bits))
    ours = accel.apply(copy.deepcopy(theirs))
    x = torch.randn(4, 6, 64)
    assert_equal_outcomes(outcome(ours, x), outcome(theirs, x))
    assert list(accel.report(ours).counts.passed_on) == [f"quantised: LoRA by PEFT: {reason}"]


def in_evaluation(layer: Any) -> None:
    layer.eval()


def without_adapters(layer: Any) -> None:
    layer.enable_adapters(False)


def with_narrow_adapters(layer: Any) -> None:
    layer.lora_A.bfloat16()
    layer.lora_B.bfloat16()


@pytest.mark.parametrize("change", [in_evaluation, without_adapters, with_narrow_adapters])
@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_one_of_a_group_that_is_unlike_the_others(name: str, change: Any) -> None:
    """Masks are those of PEFT all the same, which draws them in the order of the calls."""
    theirs = adapted(quantised(Model(64, 96), 4), lora_dropout=0.2)
    ours = accel.apply(copy.deepcopy(theirs))
    for model in (ours, theirs):
        change(model.layer.get_submodule(name))
    assert_as_peft(ours, theirs, torch.randn(4, 6, 64))
    assert accel.report(ours).counts.fused["quantised"] == (2 if name == "q_proj" else 3)


def test_merged_between_calls() -> None:
    theirs = adapted(quantised(Model(64, 96), 4))
    ours = accel.apply(copy.deepcopy(theirs))
    x = torch.randn(4, 6, 64)
    assert_equal_outcomes(outcome(ours, x), outcome(theirs, x))
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.merge()
    assert_equal_outcomes(outcome(ours, x), outcome(theirs, x))
    assert list(accel.report(ours).counts.passed_on) == [
        "quantised: LoRA by PEFT: its adapters are merged or switched off"
    ]


def test_only_what_is_adapted_and_quantised_takes_part() -> None:
    model = Model(64, 96)
    model.layer.v_proj = of_library(model.layer.v_proj, 8, False, None)
    quantised(model, 4)
    theirs = adapted(model, target_modules=["first", "q_proj", "v_proj", "o_proj"])
    ours = accel.apply(copy.deepcopy(theirs))
    claims = {claim.paths[0]: claim.label for claim in accel.report(ours).applied}
    names = {"layer.q_proj": 4, "layer.v_proj": 8, "layer.o_proj": 4}
    assert claims == {**{name: f"LoRA on {bits}-bit" for name, bits in names.items()}, "first": "LoRA"}
    x = torch.randn(4, 6, 64)
    assert_equal_outcomes(outcome(ours, x), outcome(theirs, x))


def test_a_frozen_first_layer_without_a_gradient_before_it() -> None:
    theirs = adapted(quantised(Model(64, 96), 4)).layer.q_proj
    ours = accel.apply(nn.Sequential(copy.deepcopy(theirs)))
    x = torch.randn(4, 64)
    before = x.clone()
    ours(x).sum().backward()
    theirs(x).sum().backward()
    assert torch.equal(x, before)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[0].get_parameter(name).grad, parameter.grad)
    only_quantised(ours, 1)


def test_without_the_package_there_is_a_sentence() -> None:
    model = adapted(quantised(Model(64, 96), 4))
    facts = dataclasses.replace(this_machine(), packages={})
    refusals = [no for fusion, no in accel.plan(model, facts=facts).refusals if fusion == "quantised"]
    assert {no.what for no in refusals} == {f"layer.{name}" for name in NAMES}
    assert {no.reason for no in refusals} == {
        "its base is quantised by bitsandbytes, which is not installed; pip install bitsandbytes"
    }


def test_a_base_of_another_class_is_refused() -> None:
    model = adapted(quantised(Model(64, 96), 4))
    base = model.layer.o_proj.base_layer
    base.__class__ = type("Another", (type(base),), {})
    (refusal,) = [no for fusion, no in accel.plan(model).refusals if fusion == "quantised"]
    assert str(refusal).startswith("layer.o_proj: its base is a Another, not the linear of bitsandbytes")


@pytest.mark.parametrize(("module", "library"), [("hqq", "HQQ"), ("gptq", "GPTQ"), ("torchao", "torchao")])
def test_other_quantisers_are_refused_by_name(module: str, library: str) -> None:
    model = adapted(Model())
    layer = model.layer.q_proj
    layer.__class__ = type("Layer", (nn.Module, LoraLayer), {"__module__": f"peft.tuners.lora.{module}"})
    (refusal,) = [no for fusion, no in accel.plan(model).refusals if fusion == "quantised"]
    assert str(refusal).startswith(
        f"layer.q_proj: its base is quantised by {library}; LoRA is computed beside the 4-bit"
    )


def test_nothing_quantised_nothing_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    plan = accel.plan(adapted(Model()))
    assert {claim.fusion for claim in plan.claims} == {"linear"}
    assert "bitsandbytes" not in sys.modules, "imported for nothing"
    assert not any(fusion == "quantised" for fusion, _ in plan.refusals)
