"""Bad input and places that cannot be served: the sentence that the user reads, and that nothing was half done."""

import copy
import functools
import logging
import re
from typing import Any

import accelerate.hooks
import pytest
import torch
import torch.nn.functional as F
import transformers.models.llama.modeling_llama as modeling_llama
from torch import nn

import automodel_accel as accel
import automodel_accel.api as api
from automodel_accel.kernels.contract import Choice, Refusal
from automodel_accel.patches.contract import Claim, Context
from automodel_accel.patches.mlp import MlpPatch
from automodel_accel.patches.norm import NormPatch
from automodel_accel.plan import all_patches
from tests.swap import lookalikes as look
from tests.swap.compare import assert_close, assert_equal, only, step
from tests.tiny import batch, tiny

liger = pytest.mark.skipif("not __import__('importlib').util.find_spec('liger_kernel')", reason="needs liger-kernel")


def reasons(model: nn.Module, fusion: str, **settings: Any) -> list[str]:
    """Every refusal of a fusion, as the plan states it."""
    return [str(refusal) for name, refusal in accel.plan(model, **settings).refusals if name == fusion]


def untouched(model: nn.Module) -> bool:
    """Whether no class and no attribute of ours is in the model."""
    return not any("_accel_base" in vars(type(module)) for module in model.modules())


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown setting": (
        {"nrom": False},
        "unknown setting 'nrom'. Did you mean 'norm'? Known: implementation, norm, mlp, experts, rope, attention, residual, "
        "loss, linear, quantised, fp8, fp8_layers, recompute, strict.",
    ),
    "unknown setting in a dict": ({"config": {"los": False}}, "unknown setting 'los'. Did you mean 'loss'?"),
    "unknown implementation": (
        {"norm": "tritton"},
        "unknown implementation for norm 'tritton'. Did you mean 'triton'? Known: auto, triton, torch, te, liger.",
    ),
    "unknown implementation of a fusion without places": ({"loss": "cuda"}, "unknown implementation for loss 'cuda'."),
    "implementation as a switch": (
        {"implementation": False},
        'implementation=False: expected "auto" or the name of an',
    ),
    "an implementation that no fusion has": (
        {"implementation": "tritton"},
        "unknown implementation 'tritton'. Did you mean",
    ),
    "a capital letter": ({"mlp": "Triton"}, "Did you mean 'triton'?"),
    "a number": ({"mlp": 1}, 'mlp=1: expected "auto", False, or the name of an implementation.'),
    "None": ({"mlp": None}, 'mlp=None: expected "auto", False, or the name of an implementation.'),
    "strict as text": ({"strict": "yes"}, "strict='yes': expected True or False."),
    "a config of another kind": (
        {"config": "triton"},
        "config is a str; expected an AccelConfig, a dict, or settings by name.",
    ),
}


@pytest.mark.parametrize(("settings", "text"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
@pytest.mark.parametrize("function", [accel.apply, accel.plan, lambda *a, **k: accel.accelerated(*a, **k).__enter__()])
def test_bad_settings(function: Any, settings: dict[str, Any], text: str) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=re.escape(text)):
        function(model, **settings)
    assert untouched(model)


@pytest.mark.parametrize("thing", [None, "meta-llama/Llama-3.1-8B", {}, nn.Linear])
def test_what_is_no_module(thing: Any) -> None:
    name = type(thing).__name__
    for function in (accel.apply, accel.plan):
        with pytest.raises(ValueError, match=f"expected a torch.nn.Module, got a {name}"):
            function(thing)
    for function in (accel.report, accel.revert):
        with pytest.raises(ValueError, match=f"expected a torch.nn.Module, got a {name}"):
            function(thing)


def test_applied_twice(caplog: pytest.LogCaptureFixture) -> None:
    model = accel.apply(tiny())
    report = accel.report(model)
    classes = [type(module) for module in model.modules()]
    with caplog.at_level(logging.WARNING, "automodel_accel"):
        assert accel.apply(model) is model
    assert "this LlamaForCausalLM is already applied; nothing was changed. See report(model)." in caplog.text
    assert [type(module) for module in model.modules()] == classes
    assert accel.report(model) is report
    with pytest.raises(
        ValueError, match=r"already applied with AccelConfig\(.*\); call revert\(model\) before applying"
    ):
        accel.apply(model, norm=False)
    assert [type(module) for module in model.modules()] == classes
    accel.apply(accel.revert(model), norm=False)
    assert accel.report(model).places("norm") == 0


def test_a_second_plan_of_an_applied_model_is_that_of_the_original() -> None:
    model = tiny()
    before = accel.plan(model).to_dict()
    assert accel.plan(accel.apply(model)).to_dict() == before


@pytest.mark.parametrize("model", [nn.Identity(), nn.Sequential(), nn.Linear(3, 4), nn.ReLU(), nn.ModuleDict()])
def test_modules_with_nothing_to_swap(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "automodel_accel"):
        assert accel.apply(model) is model
    assert f"nothing in this {type(model).__name__} could be swapped; print(report(model)) says why." in caplog.text
    report = accel.report(model)
    asked = {patch.fusion for patch in all_patches()} - {"fp8"}
    assert {fusion for fusion, _ in report.refusals} == asked
    assert {str(refusal) for _, refusal in report.refusals} == {"model: has no such place; nothing to do"}
    assert "has no such place" in str(report)
    accel.revert(model)
    with pytest.raises(ValueError, match=f"this {type(model).__name__} is not applied; call automodel_accel.apply"):
        accel.report(model)


def test_an_encoder_without_a_head() -> None:
    model = tiny("bert").bert
    assert reasons(model, "loss") == [
        "the model: has no output head (get_output_embeddings() is None); norms and mlps are served all the same"
    ]
    body = accel.apply(tiny().model)
    report = accel.report(body)
    assert (report.places("norm"), report.places("mlp"), report.places("loss")) == (5, 2, 0)


def test_strict_changes_nothing_and_says_what_was_asked() -> None:
    model = tiny()
    for path, module in model.named_modules():
        if path.endswith("norm"):
            module.__class__ = look.EpsOutside
            module.eps = 1e-5
    before = [type(module) for module in model.modules()]
    with pytest.raises(accel.RefusedError) as raised:
        accel.apply(model, norm=True, loss="torch", strict=True)
    assert "norm: model.layers.0.input_layernorm: normalises, but by a formula that is not root" in str(raised.value)
    assert str(raised.value).endswith("Nothing was changed.")
    assert [type(module) for module in model.modules()] == before
    with pytest.raises(ValueError, match="not applied"):
        accel.report(model)
    accel.apply(model, loss="torch", strict=True)


def test_strict_and_a_named_implementation_that_cannot_serve() -> None:
    model = tiny(dtype=torch.float64)
    with pytest.raises(
        accel.RefusedError, match=r"norm='triton' on cpu: computes .*; the tensors are torch.float64; torch serves"
    ):
        accel.apply(model, norm="triton", strict=True)
    assert untouched(model)
    accel.apply(model, norm="triton")
    assert accel.report(model).places("norm") == 5
    assert any(refusal.what == "norm='triton' on cpu" for _, refusal in accel.report(model).refusals)


@pytest.fixture
def stock_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger changes the module and its classes even where it is asked for one instance: put them back afterwards."""
    for name in list(vars(modeling_llama)):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", modeling_llama.LlamaForCausalLM.forward)


@liger
@pytest.mark.usefixtures("stock_llama")
def test_a_model_whose_instances_liger_has_changed() -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model = tiny()
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=True, rope=False)
    before = [vars(module).get("forward") for module in model.modules()]
    for fusion, places in (("norm", 5), ("mlp", 2), ("loss", 1)):
        found = reasons(model, fusion)
        assert len(found) == places
        assert all(
            ": already changed by Liger-Kernel; Liger-Kernel's forward stays; load the model without it to use ours"
            in text
            for text in found
        )
    accel.apply(model, **only("norm", "mlp", "loss"))
    assert untouched(model)
    assert [vars(module).get("forward") for module in model.modules()] == before


@liger
def test_a_model_of_classes_that_liger_has_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.transformers.rms_norm import LigerRMSNorm
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", LigerRMSNorm)
    monkeypatch.setattr(modeling_llama, "LlamaMLP", LigerSwiGLUMLP)
    model = tiny()
    for fusion, places in (("norm", 5), ("mlp", 2)):
        found = reasons(model, fusion)
        assert len(found) == places
        assert all("already changed by Liger-Kernel" in text for text in found)
    assert reasons(model, "loss") == []


@liger
def test_a_rotary_function_that_liger_has_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    @functools.wraps(liger_rotary_pos_emb)
    def run(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        raise AssertionError("another accelerator's kernel was run")

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", run)
    found = reasons(tiny(), "rope")
    assert len(found) == 2
    assert all("its rotary function is Liger-Kernel's" in text for text in found)


@liger
def test_a_model_class_whose_forward_liger_has_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.transformers.model.llama import lce_forward

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", lce_forward)
    assert reasons(tiny(), "loss") == [
        "the model: already changed by Liger-Kernel; Liger-Kernel's forward stays; load the model without it to use ours"
    ]


def test_a_forward_replaced_on_the_instance() -> None:
    model = tiny()
    expected = step(model, **batch())

    def kernelized(x: torch.Tensor) -> torch.Tensor:
        return modeling_llama.LlamaRMSNorm.forward(model.model.norm, x)

    model.model.norm.forward = kernelized
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    text = "forward was replaced on the instance by {}; that forward stays; apply before it is replaced (accelerate's device hooks, kernelize)"
    assert reasons(model, "norm") == ["model.norm: " + text.format("tests")]
    assert reasons(model, "mlp") == ["model.layers.0.mlp: " + text.format("transformers")]
    accel.apply(model)
    assert model.model.norm.forward is kernelized
    assert accel.report(model).places("norm") == 4
    assert_close(step(model, **batch()), expected)


@pytest.mark.parametrize("place", ["model.norm", "model.layers.1.mlp", "lm_head", ""])
def test_accelerates_device_hooks(place: str) -> None:
    model = tiny()
    expected = step(model, **batch())
    calls: list[int] = []

    class Watching(accelerate.hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(model.get_submodule(place), Watching())
    plan = accel.plan(model)
    assert not calls, "the probe ran the hook"
    fusion = {"model.norm": "norm", "model.layers.1.mlp": "mlp"}.get(place, "loss")
    (text,) = [str(refusal) for name, refusal in plan.refusals if name == fusion]
    assert text.startswith(f"{place or 'the model'}: forward was replaced on the instance by accelerate")
    accel.apply(model)
    assert_close(step(model, **batch()), expected)
    assert len(calls) == 1
    accelerate.hooks.remove_hook_from_module(model.get_submodule(place))
    assert_close(step(model, **batch()), expected)


class Linear8bit(nn.Linear):
    """As bitsandbytes has it: an int8 weight with a scale for each row, and a matrix product of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        del self.weight
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(input.dtype) * self.scale.to(input.dtype))


def test_8_bit_linears_are_called_and_an_8_bit_head_is_refused() -> None:
    model = tiny(tie_word_embeddings=False)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Linear8bit(getattr(layer.mlp, name)))
    model.lm_head = Linear8bit(model.lm_head)
    expected = step(model, **batch())
    accel.apply(model)
    report = accel.report(model)
    assert report.places("mlp") == 2
    assert_close(step(model, **batch()), expected)
    assert report.counts.fused["mlp"] == 2
    (text,) = reasons(model, "loss")
    assert text.startswith(
        "lm_head: the output head is a tests.swap.test_refusals.Linear8bit, expected a torch.nn.Linear"
    )
    assert text.endswith("the model's own loss stays, with its logits")


def test_a_head_with_an_int8_weight() -> None:
    model = tiny(tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    assert reasons(model, "loss") == [
        "lm_head: the head's weight is torch.int8: quantised; the model's own loss stays, with its logits"
    ]


def test_a_head_that_is_no_linear() -> None:
    model = tiny(tie_word_embeddings=False)
    model.lm_head = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 97))
    expected = step(model, **batch())
    (text,) = reasons(model, "loss")
    assert text.startswith(
        "lm_head: the output head is a torch.nn.modules.container.Sequential, expected a torch.nn.Linear"
    )
    assert_close(step(accel.apply(model), **batch()), expected)


def test_a_failure_in_the_middle_restores_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    expected = step(model, **batch())
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    swap = NormPatch.swap
    swapped: list[Claim] = []

    def failing(self: NormPatch, claim: Claim, modules: list[nn.Module], *rest: Any) -> None:
        if claim.paths == ("model.layers.0.post_attention_layernorm",):
            assert not untouched(model)
            raise OSError("the disk is full")
        swapped.append(claim)
        swap(self, claim, modules, *rest)

    monkeypatch.setattr(NormPatch, "swap", failing)
    with pytest.raises(OSError, match="the disk is full"):
        accel.apply(model)
    assert untouched(model)
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == before
    with pytest.raises(ValueError, match="not applied"):
        accel.report(model)
    monkeypatch.undo()
    assert_equal(step(model, **batch()), expected)
    assert_close(step(accel.apply(model), **batch()), expected)


class Rival(MlpPatch):
    """A second patch that wants the norms too."""

    fusion = "mlp"

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        if not path.endswith("layers.1.input_layernorm"):
            return None
        return Claim("mlp", (path,), "a rival's norm", torch.float32, ("rival",), {"cpu": Choice("rival", None, ())})


def test_two_claims_on_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "all_patches", lambda: (NormPatch(), Rival()))
    model = tiny()
    for function in (accel.plan, accel.apply):
        with pytest.raises(
            ValueError, match=r"^the forward of model.layers.1.input_layernorm is claimed by norm \(rms_norm 32, weight"
        ) as raised:
            function(model)
        assert str(raised.value).endswith("and by mlp (a rival's norm); switch one off: apply(model, mlp=False).")
    assert untouched(model)
    accel.plan(model, mlp=False)


@pytest.fixture
def custom() -> Any:
    from tests.swap.custom import Speaker

    torch.manual_seed(0)
    return Speaker().train()


@pytest.mark.parametrize("loss", ["function", "module", "chunks", "mean by hand"])
def test_a_model_that_transformers_has_never_seen(custom: Any, loss: str) -> None:
    """Own names, own norm, own MLP, own loss."""
    custom.way = loss
    words = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(0))
    inputs = {"words": words, "labels": torch.where(words > 50, -100, words)}
    expected = step(custom, **inputs)
    ours = accel.apply(copy.deepcopy(custom))
    assert_close(step(ours, **inputs), expected)
    report = accel.report(ours)
    assert (report.places("norm"), report.places("mlp"), report.places("loss")) == (3, 2, 1)
    assert report.materialised_logits == (loss == "mean by hand")
    assert report.counts.fused["loss"] == {"function": 1, "module": 1, "chunks": 4, "mean by hand": 0}[loss]
    assert_equal(step(accel.revert(ours), **inputs), expected)


def test_models_without_labels_or_with_a_strange_head(custom: Any) -> None:
    custom.forward_without_labels()
    assert reasons(custom, "loss") == [
        "the model: its forward takes no labels; it computes no loss, so there is nothing to fuse"
    ]
    custom.__class__ = type(custom).__mro__[1]
    custom.voice = [custom.mouth]
    del custom.mouth
    assert reasons(custom, "loss") == [
        "the model: its output head is not one of its modules; the model's own loss stays, with its logits"
    ]
