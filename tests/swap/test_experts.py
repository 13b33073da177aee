"""Mixtures of experts in models: found by what they compute, served exactly, and left alone where they are something else."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import automodel_accel as accel
from tests.swap.compare import Step, assert_as_good, assert_close, assert_equal, frozen, gradients, others_off, step
from tests.tiny import _SIZES, batch, shake

COUNT, WIDTH, INNER = 6, 16, 24
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": ({}, "experts, 6 of them, silu"),
    "qwen3_moe": ({"moe_intermediate_size": 24}, "experts, 6 of them, silu"),
    "gpt_oss": ({}, "experts, 6 of them, a gate of its own, biases"),
}


def tiny(name: str = "mixtral", dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """Two layers with six experts each, the same each time, in training mode."""
    sizes = {"num_local_experts": COUNT, "num_experts": COUNT, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0}
    torch.manual_seed(0)
    settings = CONFIG_MAPPING[name](**{**_SIZES, **sizes, **MODELS[name][0], **config})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)  # gpt_oss leaves its experts as the memory was
    shake(model)
    return model.to(dtype).train()


def only_experts(model: nn.Module) -> nn.Module:
    """An accelerated copy in which nothing but the experts is swapped."""
    others = others_off("experts")
    return accel.apply(copy.deepcopy(model), **others)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient(name: str) -> None:
    model = tiny(name)
    ours = only_experts(model)
    assert_close(step(ours, **batch()), step(model, **batch()))
    report = accel.report(ours)
    assert [claim.label for claim in report.applied] == [MODELS[name][1]] * 2
    assert report.counts.fused == {"experts": 2}
    assert not report.counts.passed_on


@pytest.mark.parametrize("name", MODELS)
def test_low_precision_is_as_near_to_the_truth(name: str) -> None:
    model = tiny(name, torch.bfloat16)
    ours = only_experts(model)
    truth = step(copy.deepcopy(model).float(), **batch())
    assert_as_good(step(ours, **batch()), step(model, **batch()), truth, torch.bfloat16)
    assert accel.report(ours).counts.fused == {"experts": 2}


@pytest.mark.parametrize("name", MODELS)
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    model = tiny(name)
    ours = only_experts(model)
    expected = step(ours, **batch())
    found = step(torch.compile(ours, backend="aot_eager"), **batch())  # type: ignore[arg-type]
    assert_close(Step(found.loss, gradients(ours)), expected)


def test_autocast_and_checkpointing_and_frozen_experts() -> None:
    model = tiny()
    ours = only_experts(model)
    truth = step(model, **batch())
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_good(step(ours, **batch()), step(model, **batch()), truth, torch.bfloat16)
    assert accel.report(ours).counts.fused == {"experts": 2}
    with frozen(model, "experts.down"), frozen(ours, "experts.down"):
        assert_close(step(ours, **batch()), step(model, **batch()))
    for m in (model, ours):
        m.gradient_checkpointing_enable()  # type: ignore[operator]
    assert_close(step(ours, **batch()), step(model, **batch()))


def test_an_expert_without_tokens_learns_nothing_and_has_a_gradient() -> None:
    model = tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[-1] = 0.0
            layer.mlp.gate.weight[:-1].abs_()
            layer.post_attention_layernorm.weight.zero_()  # all routers say the same
    ours = only_experts(model)
    theirs = step(model, **batch())
    assert_close(step(ours, **batch()), theirs)
    for name, gradient in gradients(ours).items():
        if "experts" in name:
            assert torch.equal(gradient == 0, theirs.gradients[name] == 0), name


def test_revert_and_copies() -> None:
    model = tiny()
    expected = step(model, **batch())
    ours = only_experts(model)
    assert_close(step(copy.deepcopy(ours), **batch()), expected)
    assert_equal(step(pickle.loads(pickle.dumps(ours)), **batch()), expected)
    assert ours.state_dict().keys() == model.state_dict().keys()
    assert_equal(step(accel.revert(ours), **batch()), expected)


def test_generation_and_evaluation() -> None:
    model = tiny().eval()
    ours = only_experts(model)
    prompt = batch()["input_ids"][:, :5]
    generated = [m.generate(prompt, max_new_tokens=6, do_sample=False) for m in (ours, model)]  # type: ignore[operator]
    assert torch.equal(*generated)
    with torch.no_grad():
        torch.testing.assert_close(ours(prompt).logits, model(prompt).logits)


@pytest.mark.parametrize("chosen", ["eager", "batched_mm", "grouped_mm"])
def test_what_transformers_writes_in_pytorch_is_served(chosen: str) -> None:
    model = tiny()
    model.set_experts_implementation(chosen)
    ours = only_experts(model)
    assert_close(step(ours, **batch()), step(model, **batch()))
    assert accel.report(ours).counts.fused == {"experts": 2}
    with torch.autocast("cpu", torch.bfloat16):
        step(ours, **batch())
    passed_on = {"experts: autocast rounds what its implementation multiplies": 2}
    assert accel.report(ours).counts.passed_on == ({} if chosen == "grouped_mm" else passed_on)


@pytest.fixture
def somebodys() -> Any:
    """Another function under a name in transformers' registry, as sonicmoe or deepgemm are."""
    calls = []

    def function(self: nn.Module, *args: Any) -> torch.Tensor:
        calls.append(1)
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](self, *args)  # type: ignore[no-any-return]

    ALL_EXPERTS_FUNCTIONS.register("somebodys", function)
    yield calls
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop("somebodys")


def test_another_implementation_that_was_chosen_serves(somebodys: list[int]) -> None:
    model = tiny()
    model.set_experts_implementation("somebodys")
    ours = only_experts(model)
    (text, _) = [str(refusal) for fusion, refusal in accel.report(ours).refusals if fusion == "experts"]
    assert text == "model.layers.0.mlp.experts: experts_implementation='somebodys' was chosen; somebodys serves"
    assert_equal(step(ours, **batch()), step(model, **batch()))
    assert len(somebodys) == 4


def test_another_implementation_that_is_chosen_later_serves(somebodys: list[int]) -> None:
    model = tiny()
    ours = only_experts(model)
    for m in (model, ours):
        m.set_experts_implementation("somebodys")  # type: ignore[operator]
    assert_equal(step(ours, **batch()), step(model, **batch()))
    assert accel.report(ours).counts.passed_on == {"experts: experts_implementation is 'somebodys' since": 2}


def test_experts_over_several_devices_are_the_original() -> None:
    model = tiny()
    ours = only_experts(model)
    for layer in ours.model.layers:
        layer.mlp.experts._is_expert_parallel = True
    assert_close(step(ours, **batch()), step(model, **batch()))
    assert accel.report(ours).counts.passed_on == {"experts: its experts are spread over several devices": 2}


def test_lora_on_the_weights_of_experts() -> None:
    """PEFT makes these weights anew in each call: the original runs, with the same gradients."""
    model = tiny()
    wrapped = []
    for m in (only_experts(model), model):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
        wrapped.append(peft.get_peft_model(m, config).train())  # type: ignore[arg-type]
        for name, parameter in wrapped[-1].named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.02)
    ours, vanilla = wrapped
    assert_close(step(ours, **batch()), step(vanilla, **batch()))
    (reason,) = accel.report(ours).counts.passed_on
    assert reason.endswith("its weights are made by an adapter")


class Experts(nn.Module):
    """Stacked experts under other names, with hooks for subclasses to differ in one thing."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor] = F.silu, halves: int = 2) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.randn(COUNT, halves * INNER, WIDTH) * 0.2)
        self.w2 = nn.Parameter(torch.randn(COUNT, WIDTH, INNER) * 0.2)
        self.act = act

    def gated(self, z: torch.Tensor) -> torch.Tensor:
        gate, up = z.chunk(2, -1)
        return self.act(gate) * up

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in range(COUNT):
            token, slot = torch.where(index == expert)
            y = F.linear(self.gated(F.linear(x[token], self.w13[expert])), self.w2[expert])
            out = out.index_add(0, token, (y * weights[token, slot, None]).to(x.dtype))
        return out


class NoGate(Experts):
    def __init__(self) -> None:
        super().__init__(lambda z: F.relu(z).square(), halves=1)

    def gated(self, z: torch.Tensor) -> torch.Tensor:
        return self.act(z)


class UpFirst(Experts):
    def gated(self, z: torch.Tensor) -> torch.Tensor:
        up, gate = z.chunk(2, -1)
        return up * self.act(gate)


class Transposed(Experts):
    """Weights (in, out), with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.w13, self.w2 = (nn.Parameter(w.detach().transpose(1, 2).contiguous()) for w in (self.w13, self.w2))
        self.b13, self.b2 = nn.Parameter(torch.randn(COUNT, 2 * INNER)), nn.Parameter(torch.randn(COUNT, WIDTH))

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in range(COUNT):
            token, slot = torch.where(index == expert)
            z = self.gated(x[token] @ self.w13[expert] + self.b13[expert])
            out = out.index_add(0, token, (z @ self.w2[expert] + self.b2[expert]) * weights[token, slot, None])
        return out


class OwnGate(Experts):
    """Clamped, and interleaved: in a method that transformers' interface would call."""

    def _apply_gate(self, z: torch.Tensor) -> torch.Tensor:
        gate, up = z[..., ::2].clamp(max=2.0), z[..., 1::2].clamp(-2.0, 2.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    def gated(self, z: torch.Tensor) -> torch.Tensor:
        return self._apply_gate(z)


class Unrelated(Experts):
    """Its `_apply_gate` is not what it computes."""

    def _apply_gate(self, z: torch.Tensor) -> torch.Tensor:
        return z.chunk(2, -1)[0]

    def gated(self, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z.chunk(2, -1)[0])


class Clamped(Experts):
    def gated(self, z: torch.Tensor) -> torch.Tensor:
        return super().gated(z).clamp(max=300.0)


class WithScale(Experts):
    """An argument more."""

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, index, weights) * scale


class WithResidual(Experts):
    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x, index, weights)


class WithNorm(Experts):
    """A norm after each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x, index, weights))  # type: ignore[no-any-return]


class DetachedRouter(Experts):
    """Right in value, wrong in gradient."""

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super().forward(x, index, weights.detach())


class Noisy(Experts):
    def gated(self, z: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().gated(z), 0.2, self.training)


class Different(Experts):
    """Two experts more go in than come out."""

    def __init__(self) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.randn(COUNT + 2, 2 * INNER, WIDTH) * 0.2)


def run(host: nn.Module, *more: float, scale: float = 1.0) -> Step:
    """Output, and the gradient of the hidden states, of the router's weights and of every parameter."""
    host.zero_grad()
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(20, WIDTH, generator=generator) * scale).requires_grad_()
    weights = torch.rand(20, 2, generator=generator).requires_grad_()
    index = torch.stack([torch.randperm(COUNT - 1, generator=generator)[:2] for _ in range(20)])
    torch.manual_seed(5)
    y = host[0](x, index, weights, *more)  # type: ignore[index]
    (y * torch.linspace(-1, 1, WIDTH)).sum().backward()
    found = {"x": x.grad, "weights": weights.grad}
    return Step(y.detach(), {**{n: g for n, g in found.items() if g is not None}, **gradients(host)})


SERVED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "silu": (Experts, "silu"),
    "gelu": (lambda: Experts(F.gelu), "gelu"),
    "gelu_tanh": (lambda: Experts(nn.GELU(approximate="tanh")), "gelu_tanh"),
    "no gate": (NoGate, "relu2, no gate"),
    "up first": (UpFirst, "silu"),
    "transposed, biases": (Transposed, "silu, biases"),
    "a gate of its own": (OwnGate, "a gate of its own"),
}


@pytest.mark.parametrize(("make", "label"), SERVED.values(), ids=SERVED)
def test_experts_that_are_served(make: Callable[[], nn.Module], label: str) -> None:
    torch.manual_seed(0)
    host = nn.Sequential(make()).train()
    ours = only_experts(host)
    for scale in (1.0, 0.0, 30.0):
        assert_close(run(ours, scale=scale), run(host, scale=scale))
    report = accel.report(ours)
    assert [claim.label for claim in report.applied] == [f"experts, {COUNT} of them, {label}"]
    assert report.counts.fused == {"experts": 3}


UNSERVED: dict[str, tuple[Callable[[], nn.Module], tuple[float, ...], str]] = {
    "nearly silu": (lambda: Experts(lambda z: z * torch.sigmoid(1.00001 * z)), (), "something else than silu"),
    "a sigmoid": (lambda: Experts(torch.sigmoid), (), "something else than silu"),
    "another gate than its _apply_gate": (Unrelated, (), "something else than silu"),
    "a clamp far out": (Clamped, (), "something else than silu"),
    "activates in float32": (lambda: Experts(lambda z: F.silu(z.float()).to(z.dtype)), (), "only nearly"),
    "an argument more": (WithScale, (0.5,), "not called with hidden states, indices and weights"),
    "a residual": (WithResidual, (), "something else than silu"),
    "a norm": (WithNorm, (), "a module of their own, such as a norm"),
    "a router without gradient": (DetachedRouter, (), "a gradient of their own"),
    "dropout": (Noisy, (), "something else in training"),
    "experts that come out only": (Different, (), "different numbers of experts"),
}


@pytest.mark.parametrize(("make", "more", "reason"), UNSERVED.values(), ids=UNSERVED)
def test_experts_that_only_look_like_it(make: Callable[[], nn.Module], more: tuple[float, ...], reason: str) -> None:
    torch.manual_seed(0)
    host = nn.Sequential(make()).train()
    ours = only_experts(host)
    assert_equal(run(ours, *more), run(host, *more))
    (refusal,) = [refusal for fusion, refusal in accel.report(ours).refusals if fusion == "experts"]
    assert refusal.what == "0"
    assert reason in refusal.reason


def test_two_stacks_of_something_else_are_not_spoken_of() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.positions = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 9, WIDTH))

    assert {str(no) for fusion, no in accel.plan(nn.Sequential(Embedding())).refusals if fusion == "experts"} == {
        "model: has no such place; nothing to do"
    }


def test_a_call_by_keyword_or_of_three_dimensions_is_the_original() -> None:
    host = nn.Sequential(Experts()).train()
    ours = only_experts(host)
    x, index, weights = torch.randn(4, WIDTH), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    assert torch.equal(ours[0](x, index, weights=weights), host[0](x, index, weights=weights))  # type: ignore[index]
    assert accel.report(ours).counts.passed_on == {
        "experts: called with other arguments than hidden states, indices and weights": 1
    }
