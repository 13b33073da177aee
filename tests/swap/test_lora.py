"""PEFT's LoRA layers inside of fused linears: as right as PEFT alone, or handed to PEFT."""

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import nn

import automodel_accel as accel
from automodel_accel.adapters import with_lora
from automodel_accel.kernels.numerics import judge
from tests.budgets.layers import LINEARS as ALL
from tests.swap.compare import assert_close, assert_equal, step
from tests.tiny import batch, tiny

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


class Layer(nn.Module):
    """Three linears of one input, and one of what they give."""

    def __init__(self, hidden: int, width: int, bias: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, width, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.sigmoid(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x)
        return self.o_proj(mixed)  # type: ignore[no-any-return]


class Model(nn.Module):
    """A layer between two linears."""

    def __init__(self, hidden: int = 12, width: int = 10, bias: bool = False) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(hidden, hidden), Layer(hidden, width, bias), nn.Linear(hidden, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(self.first(x)))  # type: ignore[no-any-return]


def adapted(model: nn.Module, **config: Any) -> nn.Module:
    """PEFT's LoRA on a model, A and B random."""
    defaults = {"r": 4, "target_modules": list(NAMES), "init_lora_weights": False}
    torch.manual_seed(1)
    return peft.inject_adapter_in_model(peft.LoraConfig(**{**defaults, **config}), model).train()  # type: ignore[no-any-return]


def fused_and_passed(model: nn.Module) -> tuple[int, list[str]]:
    counts = accel.report(model).counts
    return counts.fused["linear"], [reason for reason in counts.passed_on if reason.startswith("linear")]


def outcome(model: nn.Module, x: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """The output, and the gradient of x and of every parameter that trains."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.detach().requires_grad_()
    output = model(x)
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype))
    assert x.grad is not None
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **grads}


def assert_as_peft(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """By the error ratio against PEFT in float64: of all results in one dtype, each in units of its largest element.

    Apart, a gradient of rank 1 has so few elements that chance would decide.
    """
    truth = copy.deepcopy(theirs).double()
    found, expected, exact = outcome(ours, x), outcome(theirs, x), outcome(truth, x.double())
    assert found.keys() == expected.keys()
    for dtype in {tensor.dtype for tensor in expected.values()}:
        names = [name for name, tensor in expected.items() if tensor.dtype is dtype]
        # a power of 2: no rounding of its own
        units = {name: 2.0 ** exact[name].abs().max().clamp_min(1e-30).log2().ceil().item() for name in names}
        parts = (
            torch.cat([(some[name] / units[name]).flatten() for name in names]) for some in (found, expected, exact)
        )
        verdict = judge(*parts)
        assert verdict.passed, f"{dtype}: {verdict}"


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rank=st.sampled_from([1, 2, 3, 8, 16, 64, 256]),
    sizes=st.sampled_from([(12, 10), (7, 5), (32, 48), (1, 3)]),
    targets=st.sets(st.sampled_from(NAMES), min_size=1).map(sorted),
    low=st.sampled_from([torch.float32, torch.bfloat16]),
    wide_adapters=st.booleans(),
    rslora=st.booleans(),
    alpha=st.sampled_from([1, 3, 16, 32]),
    bias=st.booleans(),
)
def test_equal_to_peft(
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
    model = Model(*sizes, bias=bias).to(low)
    config = {"r": rank, "target_modules": targets, "use_rslora": rslora, "lora_alpha": alpha}
    theirs = adapted(model, **config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:  # as PEFT initialises them: what they add is of the order of the output, not beyond
            parameter.data = (torch.randn_like(parameter, dtype=torch.float32) / rank).to(
                torch.float32 if wide_adapters else low
            )
    ours = accel.apply(copy.deepcopy(theirs), strict=True)
    assert_as_peft(ours, theirs, torch.randn(60, 7, sizes[0], generator=torch.Generator().manual_seed(2)).to(low))
    fused, passed = fused_and_passed(ours)
    assert fused > 0
    assert not passed


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_draws_what_peft_draws(p: float) -> None:
    theirs = adapted(Model(), lora_dropout=p)
    ours = accel.apply(copy.deepcopy(theirs))
    x = torch.randn(4, 6, 12)
    for seed in range(3):
        found, expected = outcome(ours, x, seed), outcome(theirs, x, seed)
        after = torch.rand(())
        outcome(ours, x, seed)
        assert torch.rand(()) == after, "the random numbers go on elsewhere than after PEFT"
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])
    assert fused_and_passed(ours) == (2 * 6, [])
    for model in (ours, theirs):
        model.eval()
    assert_equal_outcomes(outcome(ours, x), outcome(theirs, x))


def assert_equal_outcomes(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=name)


def dora(layer: Any) -> nn.Module:
    return adapted(layer, use_dora=True)


def two_adapters(layer: nn.Module) -> nn.Module:
    model = adapted(layer)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model, adapter_name="other")
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.set_adapter(["default", "other"])
    return model.train()


def with_a_bias(layer: nn.Module) -> nn.Module:
    return adapted(layer, lora_bias=True)


def with_a_hook(layer: nn.Module) -> nn.Module:
    model = adapted(layer)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_A["default"].register_forward_hook(lambda module, args, output: output * 2)
    return model


def ia3(layer: nn.Module) -> nn.Module:
    config = peft.IA3Config(target_modules=list(NAMES), feedforward_modules=["o_proj"], init_ia3_weights=False)
    return peft.inject_adapter_in_model(config, layer).train()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dora, "its adapter is a DoraLinearVariant"),
        (two_adapters, "2 adapters are active"),
        (with_a_bias, "its adapter is not two linears without bias"),
        (with_a_hook, "there are hooks inside of it"),
        (ia3, None),
    ],
)
def test_what_is_not_one_plain_adapter_is_left_to_peft(make: Any, reason: str | None) -> None:
    torch.manual_seed(0)
    theirs = make(Model(bias=True))
    ours = accel.apply(copy.deepcopy(theirs))
    x = torch.randn(4, 6, 12)
    assert_equal_outcomes(outcome(ours, x), outcome(theirs, x))
    passed = fused_and_passed(ours)[1]
    assert passed == ([] if reason is None else [f"linear: LoRA by PEFT: {reason}"])


def test_merged_and_switched_off_between_calls() -> None:
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=ALL, init_lora_weights=False)).train()
    ours = accel.apply(copy.deepcopy(theirs))
    assert_close(step(ours, **batch()), step(theirs, **batch()))
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(**batch()).loss, theirs(**batch()).loss)
    for model in (ours, theirs):
        model.merge_adapter()
    torch.testing.assert_close(ours(**batch()).loss, theirs(**batch()).loss)
    assert fused_and_passed(ours)[1] == ["linear: LoRA by PEFT: its adapters are merged or switched off"]
    for model in (ours, theirs):
        model.unmerge_adapter()
    assert_close(step(ours, **batch()), step(theirs, **batch()))
    for model in (ours, theirs):
        model.eval()
    mixed = {**batch(), "adapter_names": ["default"] * (len(batch()["input_ids"]) - 1) + ["__base__"]}
    torch.testing.assert_close(ours(**mixed).logits, theirs(**mixed).logits)
    assert_equal(step(accel.revert(ours.train()), **batch()), step(theirs.train(), **batch()))


def test_twenty_steps_with_dropout_give_the_losses_of_peft() -> None:
    curves = []
    for apply in (False, True):
        model = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, target_modules=ALL, lora_dropout=0.1)).train()
        if apply:
            accel.apply(model)
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
    vanilla, ours = curves
    assert ours == pytest.approx(vanilla, rel=1e-5)
    assert ours[-1] < ours[0]


def test_a_head_with_an_adapter_stays_with_the_loss() -> None:
    config = peft.LoraConfig(r=2, target_modules=[*ALL, "lm_head"], init_lora_weights=False)
    theirs = peft.get_peft_model(tiny(tie_word_embeddings=False), config).train()
    ours = accel.apply(copy.deepcopy(theirs))
    assert_close(step(ours, **batch()), step(theirs, **batch()))
    report = accel.report(ours)
    assert report.counts.fused["loss"] == 1
    assert report.materialised_logits == 0
    assert not any("lm_head" in path for claim in report.applied if claim.fusion == "linear" for path in claim.paths)


def test_an_adapter_that_changes_after_apply_is_the_one_that_counts() -> None:
    theirs = adapted(Model())
    ours = accel.apply(copy.deepcopy(theirs))
    x = torch.randn(4, 6, 12)
    outcome(ours, x)
    for model in (ours, theirs):
        torch.manual_seed(9)
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                module.scaling["default"] *= 3
                module.lora_A["default"] = nn.Linear(module.in_features, 6, bias=False)
                module.lora_B["default"] = nn.Linear(6, module.out_features, bias=False)
    assert_equal_outcomes(outcome(ours, x), outcome(theirs, x))
    assert fused_and_passed(ours)[1] == []


def test_a_weight_that_trains_beside_its_adapter() -> None:
    theirs = adapted(Model(bias=True), bias="all")
    for parameter in theirs.parameters():
        parameter.requires_grad_()
    ours = accel.apply(copy.deepcopy(theirs))
    x = F.normalize(torch.randn(4, 6, 12), dim=-1)
    assert_equal_outcomes(outcome(ours, x), outcome(theirs, x))
    assert "layer.q_proj.base_layer.weight" in outcome(ours, x)


class Clipped(nn.Module):
    """A linear within a module of the same last name as others have: PEFT knows no adapter for it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).clamp(-1, 1)  # type: ignore[no-any-return]


class Seeing(Model):
    """A model with a tower whose q_proj is no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({"q_proj": Clipped(), "o_proj": nn.Linear(12, 12)})


def targets(model: nn.Module, **lora: Any) -> set[str]:
    adapted_model = with_lora(model, {"r": 2, **lora})
    return {
        name.removeprefix("base_model.model.")
        for name, one in adapted_model.named_modules()
        if isinstance(one, LoraLayer)
    }


def test_a_wildcard_takes_linears_alone() -> None:
    everywhere = {"layer.q_proj", "layer.k_proj", "layer.v_proj", "layer.o_proj", "vision_tower.o_proj"}
    assert targets(Seeing(), target_modules=["*_proj"]) == everywhere


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (["*vision*"], {"layer.q_proj", "layer.k_proj", "layer.v_proj", "layer.o_proj"}),
        (["*.o_proj"], {"layer.q_proj", "layer.k_proj", "layer.v_proj"}),
        ("*o_proj", {"layer.q_proj", "layer.k_proj", "layer.v_proj"}),
        (["vision_tower.o_proj", "layer.[kv]_proj"], {"layer.q_proj", "layer.o_proj"}),
        (["*sound*"], {"layer.q_proj", "layer.k_proj", "layer.v_proj", "layer.o_proj", "vision_tower.o_proj"}),
    ],
    ids=["a tower", "dotted", "one pattern", "by name", "nothing"],
)
def test_wildcards_exclude_too(excluded: Any, left: set[str]) -> None:
    assert targets(Seeing(), target_modules=["*_proj"], exclude_modules=excluded) == left
