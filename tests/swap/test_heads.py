"""Heads that are more than one linear: PEFT's adapters on them, and models that add a vector to their logits."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import automodel_accel as accel
from tests.ops.allocations import Allocations
from tests.swap.compare import Step, applied, assert_as_good, assert_close, gradients, only, step
from tests.tiny import VOCABULARY, batch, tiny

HEAD: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"], "r": 3, "lora_alpha": 2}


def adapted(model: nn.Module, method: type[peft.PeftConfig] = peft.LoraConfig, **config: Any) -> Any:
    """PEFT's adapters, the same random numbers each time, none of them zero."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, method(**config))
    shake(wrapped)
    return wrapped.train()


def shake(wrapped: nn.Module) -> None:
    torch.manual_seed(4)
    with torch.no_grad():
        for _, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def pair(before: bool, model: nn.Module | None = None, linear: bool = True, **config: Any) -> tuple[Any, Any]:
    """(ours, vanilla): applied before or after the adapters came."""
    model = tiny(tie_word_embeddings=False) if model is None else model
    vanilla = adapted(copy.deepcopy(model), **config)
    if before:
        return adapted(applied(model, linear=linear), **config), vanilla
    return accel.apply(adapted(model, **config), linear=linear), vanilla


def same_step(ours: nn.Module, vanilla: nn.Module, **inputs: Any) -> None:
    """The same random numbers for both: for dropout."""
    steps = []
    for model in (ours, vanilla):
        torch.manual_seed(7)
        steps.append(step(model, **(inputs or batch())))
    assert_close(*steps)


BEFORE = pytest.mark.parametrize("before", [True, False], ids=["apply, then peft", "peft, then apply"])

FUSED: dict[str, dict[str, Any]] = {
    "plain": HEAD,
    "head alone": {**HEAD, "target_modules": ["lm_head"]},
    "all linears": {"target_modules": "all-linear", "r": 2},
    "all linears and the head": {"target_modules": ".*(proj|lm_head)", "r": 2},
    "rslora": {**HEAD, "use_rslora": True},
    "dropout": {**HEAD, "lora_dropout": 0.4},
    "a factor of one": {**HEAD, "lora_alpha": 3},
    "a negative factor": {**HEAD, "lora_alpha": -5},
    "rank above the width": {**HEAD, "r": 40},
    "saved": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "saved, with norms": {"modules_to_save": ["lm_head", "norm"], "target_modules": "all-linear"},
    "oft": {"method": peft.OFTConfig, "target_modules": ["lm_head"], "r": 0, "oft_block_size": 8},
}


@BEFORE
@pytest.mark.parametrize("config", FUSED.values(), ids=FUSED)
def test_fused(config: dict[str, Any], before: bool) -> None:
    ours, vanilla = pair(before, **config)
    same_step(ours, vanilla)
    same_step(ours, vanilla)
    report = accel.report(ours)
    assert report.counts.fused["loss"] == 2
    assert report.materialised_logits == 0
    assert not report.counts.passed_on


EXACT: dict[str, dict[str, Any]] = {
    "dora": {**HEAD, "use_dora": True},
    "vera": {"method": peft.VeraConfig, "target_modules": ["lm_head"], "r": 4},
    "ia3": {"method": peft.IA3Config, "target_modules": ["lm_head"], "feedforward_modules": []},
    "loha": {"method": peft.LoHaConfig, "target_modules": ["lm_head"], "r": 4},
    "lokr": {"method": peft.LoKrConfig, "target_modules": ["lm_head"], "r": 4},
    "adalora": {"method": peft.AdaLoraConfig, "target_modules": ["lm_head"], "total_step": 10},
    "a factor of zero": {**HEAD, "lora_alpha": 0},
}


@BEFORE
@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT)
def test_other_adapters_are_exact_and_counted(config: dict[str, Any], before: bool) -> None:
    ours, vanilla = pair(before, **config)
    same_step(ours, vanilla)
    report = accel.report(ours)
    assert report.counts.fused["loss"] == 0
    assert report.materialised_logits > 0 or report.counts.passed_on


@BEFORE
@pytest.mark.parametrize("name", ["gpt_neox", "gemma2", "cohere", "granite"])
def test_other_architectures(name: str, before: bool) -> None:
    model = tiny(name, tie_word_embeddings=False)
    (head,) = [path for path, module in model.named_modules() if module is model.get_output_embeddings()]
    ours, vanilla = pair(before, model, target_modules=[head], r=4)
    same_step(ours, vanilla)
    assert accel.report(ours).materialised_logits == 0
    assert accel.report(ours).counts.fused["loss"] == 1


@BEFORE
@pytest.mark.parametrize("config", [HEAD, FUSED["saved"]], ids=["lora", "saved"])
def test_tied_head(config: dict[str, Any], before: bool) -> None:
    ours, vanilla = pair(before, tiny(tie_word_embeddings=True), **config)
    same_step(ours, vanilla)
    assert accel.report(ours).materialised_logits == 0


@BEFORE
def test_a_bias_of_the_head_and_of_the_adapter(before: bool) -> None:
    model = tiny(tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, VOCABULARY)
    ours, vanilla = pair(before, model, **{**HEAD, "lora_bias": True, "target_modules": ["lm_head"]}, bias="all")
    same_step(ours, vanilla)
    assert {"lm_head.base_layer.bias", "lm_head.lora_B.default.bias"} <= {
        name.removeprefix("base_model.model.") for name in gradients(ours)
    }
    assert accel.report(ours).materialised_logits == 0


@BEFORE
def test_several_adapters_switched_off_merged_and_deleted(before: bool) -> None:
    ours, vanilla = pair(before, **HEAD)
    same_step(ours, vanilla)
    for model in (ours, vanilla):
        torch.manual_seed(5)
        model.add_adapter("second", peft.LoraConfig(**{**HEAD, "r": 5, "target_modules": ["lm_head"]}))
    for names in ("second", ["default", "second"]):
        for model in (ours, vanilla):
            model.base_model.set_adapter(names)
            shake(model)
        same_step(ours, vanilla)
    assert accel.report(ours).counts.fused["loss"] == 3
    for model in (ours, vanilla):
        model.merge_adapter()
    for parameter in (*ours.parameters(), *vanilla.parameters()):
        parameter.requires_grad_()
    same_step(ours, vanilla)
    for model in (ours, vanilla):
        model.unmerge_adapter()
    with ours.disable_adapter(), vanilla.disable_adapter():
        same_step(ours, vanilla)
    for model in (ours, vanilla):
        model.delete_adapter("default")
    same_step(ours, vanilla)
    assert accel.report(ours).counts.fused["loss"] == 6
    assert accel.report(ours).materialised_logits == 0


@BEFORE
def test_a_saved_head_of_two_adapters(before: bool) -> None:
    ours, vanilla = pair(before, **FUSED["saved"])
    for model in (ours, vanilla):
        torch.manual_seed(5)
        model.add_adapter("second", peft.LoraConfig(**FUSED["saved"]))
        model.set_adapter("second")
        shake(model)
    same_step(ours, vanilla)
    for model in (ours, vanilla):
        model.set_adapter("default")
    same_step(ours, vanilla)
    with ours.disable_adapter(), vanilla.disable_adapter():
        for parameter in (*ours.parameters(), *vanilla.parameters()):
            parameter.requires_grad_()
        same_step(ours, vanilla)
    assert accel.report(ours).counts.fused["loss"] == 3
    assert accel.report(ours).materialised_logits == 0


@BEFORE
@pytest.mark.parametrize("kept_in", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [HEAD, FUSED["saved"]], ids=["lora", "saved"])
def test_bfloat16(config: dict[str, Any], before: bool, kept_in: torch.dtype) -> None:
    """PEFT keeps adapters of a 16-bit model in float32; some people cast them."""
    model = tiny(dtype=torch.bfloat16, tie_word_embeddings=False)
    ours, vanilla = pair(before, model, **config)
    for one in (ours, vanilla):
        for name, parameter in one.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.to(kept_in)
    truth = copy.deepcopy(vanilla).float()
    assert_as_good(step(ours, **batch()), step(vanilla, **batch()), step(truth, **batch()), torch.bfloat16)
    assert accel.report(ours).counts.fused["loss"] == 1
    assert accel.report(ours).materialised_logits == 0


@BEFORE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [HEAD, FUSED["saved"]], ids=["lora", "saved"])
def test_autocast(config: dict[str, Any], before: bool, dtype: torch.dtype) -> None:
    ours, vanilla = pair(before, tiny(dtype=dtype, tie_word_embeddings=False), **config)
    truth = step(copy.deepcopy(vanilla).float(), **batch())
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = step(ours, **batch()), step(vanilla, **batch())
    assert_as_good(mine, theirs, truth, torch.bfloat16)
    assert accel.report(ours).counts.fused["loss"] == 1
    assert accel.report(ours).materialised_logits == 0


USES: dict[str, Callable[[Any], torch.Tensor]] = {
    "read": lambda z: z.logsumexp(-1).mean(),
    "written": lambda z: _written(z),
    "added": lambda z: (z + torch.linspace(-1, 1, VOCABULARY)).square().mean(),
    "a prefix": lambda z: F.cross_entropy(z[:, 1:, :60].reshape(-1, 60), torch.arange(46)),
    "no reduction": lambda z: F.cross_entropy(z.flatten(0, 1), torch.arange(48), reduction="none").square().sum(),
    "a cap": lambda z: F.cross_entropy((2.5 * torch.tanh(z / 2.5)).flatten(0, 1), torch.arange(48)),
    "classes in the second dimension": lambda z: F.cross_entropy(z.transpose(1, 2), torch.ones(2, 24).long()),
    "summed": lambda z: F.cross_entropy((z + z).flatten(0, 1), torch.arange(48)),
}


def _written(z: Any) -> torch.Tensor:
    flat = z.view(-1, VOCABULARY)
    z[..., 3] = -100.0
    return F.cross_entropy(flat, torch.arange(48))


@BEFORE
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_logits_in_a_loss_of_the_user(use: Callable[[Any], torch.Tensor], before: bool) -> None:
    steps = []
    for model in pair(before, **{**HEAD, "lora_dropout": 0.3}):
        torch.manual_seed(7)
        outputs = model(**batch())
        loss = outputs.loss + use(outputs.logits)
        loss.backward()
        steps.append(Step(loss.detach(), gradients(model)))
    assert_close(*steps)


def test_logits_read_outside_of_the_region_of_autocast() -> None:
    ours, vanilla = pair(True, **HEAD)
    read = []
    for model in (ours, vanilla):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch()).logits
        assert logits.dtype == torch.bfloat16
        read.append(logits.detach())
    assert torch.equal(*read)


def test_logits_read_after_an_optimizer_step() -> None:
    ours, _ = pair(True, **HEAD)
    outputs = ours(**batch())
    outputs.loss.backward()
    torch.optim.SGD(ours.parameters(), lr=0.5).step()
    with pytest.raises(RuntimeError, match=r"the output head has changed since.*loss=False"):
        outputs.logits.argmax(-1)


@BEFORE
def test_evaluation_and_generation_are_real(before: bool) -> None:
    ours, vanilla = pair(before, **HEAD)
    ours.eval(), vanilla.eval()
    mine = ours(**batch())
    assert type(mine.logits) is torch.Tensor
    assert torch.equal(mine.logits, vanilla(**batch()).logits)
    tokens = batch()["input_ids"][:, :5]
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(ours.generate(tokens, **settings), vanilla.generate(tokens, **settings))


@BEFORE
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(before: bool, reentrant: bool) -> None:
    ours, vanilla = pair(before, **HEAD)
    for model in (ours, vanilla):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    same_step(ours, vanilla)
    assert accel.report(ours).counts.fused["loss"] == 1


@BEFORE
@pytest.mark.parametrize("config", [HEAD, FUSED["saved"]], ids=["lora", "saved"])
def test_files_revert_and_unloading(config: dict[str, Any], before: bool, tmp_path: Any) -> None:
    ours, vanilla = pair(before, **config)
    same_step(ours, vanilla)
    for name, model in (("ours", ours), ("theirs", vanilla)):
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    accel.revert(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in vanilla.modules()]
    assert [sorted(vars(module)) for module in ours.modules()] == [sorted(vars(module)) for module in vanilla.modules()]
    same_step(ours, vanilla)
    merged = [model.merge_and_unload().requires_grad_() for model in (accel.apply(ours), vanilla)]
    same_step(*merged)
    assert accel.report(merged[0]).materialised_logits == 0


@BEFORE
def test_a_frozen_head_takes_no_memory_for_its_gradient(before: bool) -> None:
    ours, _ = pair(before, tiny(tie_word_embeddings=False, vocab_size=1009), **{**HEAD, "target_modules": ["lm_head"]})
    ours(**batch(rows=8)).loss.backward()
    with Allocations() as allocations:
        ours(**batch(rows=8)).loss.backward()
    one_chunk = 4 * 8 * 24 * 1024
    assert sum(size >= 4 * 1009 * 32 for size in allocations.sizes) == 1
    assert max(allocations.sizes) <= one_chunk


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@BEFORE
@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate(before: bool) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    ours, vanilla = pair(before, linear=False, **HEAD)  # so that the hidden states have vanilla's bits
    truth = step(copy.deepcopy(vanilla), **batch())
    mine, theirs = (accelerator.prepare(model) for model in (ours, vanilla))
    assert_as_good(step(mine, **batch()), step(theirs, **batch()), truth, torch.bfloat16)
    assert accel.report(ours).counts.fused["loss"] == 1
    assert accel.report(ours).materialised_logits == 0
    logits = [model(**batch()).logits for model in (mine, theirs)]
    assert torch.equal(logits[0].detach(), logits[1].detach())


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_vector_on_the_logits(zeros: bool, dtype: torch.dtype) -> None:
    """BART adds a buffer."""
    model = tiny("bart", dtype)
    if not zeros:
        torch.manual_seed(0)
        model.final_logits_bias.normal_()
    ours = applied(model)
    if dtype == torch.float32:
        same_step(ours, model)
    else:
        truth = step(copy.deepcopy(model).float(), **batch())
        assert_as_good(step(ours, **batch()), step(model, **batch()), truth, dtype)
    assert accel.report(ours).materialised_logits == 0


def test_a_vector_in_a_wider_dtype_needs_logits() -> None:
    model = tiny("bart")
    model.final_logits_bias.normal_()
    ours, truth = applied(model), step(model, **batch())
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_good(step(ours, **batch()), step(model, **batch()), truth, torch.bfloat16)
    assert accel.report(ours).counts.materialised == {"__add__": 1}


def test_the_plan_says_that_the_head_is_adapted() -> None:
    model = adapted(tiny(tie_word_embeddings=False), **HEAD)
    (claim,) = [claim for claim in accel.plan(model).claims if claim.fusion == "loss"]
    assert claim.label.endswith(", adapted")
    head = "base_model.model.lm_head"
    assert claim.paths == ("base_model.model", f"{head}.lora_B.default", f"{head}.base_layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_of_call_is_proved_whatever_the_vocabulary(bias: bool, dtype: torch.dtype) -> None:
    """No luck in it: the error allowed does not depend on which roundings a vocabulary happens to bring."""
    for vocab in (1, 2, 60, 777, 1000, 5000, 32000):
        owner = tiny(tie_word_embeddings=False)
        owner.lm_head = nn.Linear(32, vocab, bias, dtype=dtype)
        accel.apply(owner, **only("loss"))
        (proof,) = accel.report(owner).proofs.values()
        assert not proof.failed, vocab
        assert {("cpu", dtype), ("cpu", dtype, dtype), ("cpu", dtype, torch.float32)} <= proof.proven.keys()


def test_a_quantised_head_stays_refused() -> None:
    model = adapted(tiny(tie_word_embeddings=False), **HEAD)
    weight = model.base_model.model.lm_head.base_layer.weight
    model.base_model.model.lm_head.base_layer.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    (refusal,) = [no for fusion, no in accel.plan(model).refusals if fusion == "loss"]
    assert str(refusal).startswith("base_model.model.lm_head.base_layer: the head's weight is torch.int8: quantised")
