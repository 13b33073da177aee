"""Swaps in models, and wrappers around them: failures that others are known for. The table is known.py."""

import copy
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import automodel_accel as accel
from automodel_accel.kernels.rms_norm import rms_norm
from tests.budgets.liger import runnable
from tests.loops import rivals
from tests.loops.known import LOSS, MODELS, ROWS, Row
from tests.loops.zero3 import Partition
from tests.swap.compare import Step, applied, assert_as_good, assert_close, assert_equal, gradients, step
from tests.swap.conftest import mesh as mesh  # one process with gloo
from tests.swap.test_heads import adapted
from tests.swap.test_wrappers import SHARDINGS, shard, whole
from tests.tiny import CAUSAL, batch, tiny

PACKAGES = ("torch", "transformers", "peft", "accelerate")


def untied() -> Any:
    """A tiny llama whose head is a weight of its own."""
    return tiny(tie_word_embeddings=False)


def globals_of_the_process() -> dict[tuple[str, str], int]:
    """The identity of every function and class in every module of the packages that are around."""
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] in PACKAGES]
    spaces: list[Any] = [*modules, nn.Module, nn.Linear, torch.Tensor, modeling_llama.LlamaForCausalLM]
    spaces += [modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP, modeling_llama.LlamaAttention]
    return {
        (space.__name__, name): id(value)
        for space in spaces
        for name, value in vars(space).items()
        if callable(value) and not name.startswith("_")
    }


def changed(before: dict[tuple[str, str], int]) -> set[str]:
    """What is another object since."""
    now = globals_of_the_process()
    return {name for (space, name), value in before.items() if now.get((space, name)) != value}


def test_other_models_of_the_process_are_untouched() -> None:
    """linkedin/Liger-Kernel#242, #920, #772, #1360; unslothai/unsloth#1713, #2587, #2076: classes and functions of everybody."""
    teacher, plain, model = untied(), untied(), untied()
    expected = step(teacher, **batch())
    before = globals_of_the_process()
    step(accel.apply(model), **batch())
    assert changed(before) == set()
    assert_equal(step(teacher, **batch()), expected)
    assert_equal(step(untied(), **batch()), expected)  # one that is built now
    with rivals.ligers_globals(untied()):
        assert changed(before) >= {"LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb", "cross_entropy"}
        assert type(AutoModelForCausalLM.from_config(teacher.config).model.norm) is not type(plain.model.norm)
    assert changed(before) == set()


@pytest.mark.parametrize("name", CAUSAL)
def test_a_model_that_was_built_before_is_swapped_whole(name: str) -> None:
    """linkedin/Liger-Kernel#170, #199, #392, #764, #115: only models built later; attributes missing; a list of known names."""
    model = tiny(name)
    report = accel.report(accel.apply(model))
    assert {fusion: report.places(fusion) for fusion in CAUSAL[name]} == CAUSAL[name]
    step(model, **batch())
    assert report.counts.passed_on.total() == 0


@pytest.mark.parametrize("before", [True, False], ids=["apply, then peft", "peft, then apply"])
def test_norms_that_peft_saves(before: bool) -> None:
    """linkedin/Liger-Kernel#631: the wrapper around two norms was changed in their place, and training failed."""
    config = {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}
    model = untied()
    vanilla = adapted(copy.deepcopy(model), **config)
    ours = adapted(accel.apply(model), **config) if before else accel.apply(adapted(model, **config))
    assert_close(step(ours, **batch()), step(vanilla, **batch()))
    assert any("modules_to_save.default.weight" in name and "norm" in name for name in gradients(ours))


def test_in_place_norm_does_not_corrupt_gradients() -> None:
    """linkedin/Liger-Kernel#370, #376, #1305: the gradient that comes in is overwritten, but gemma2's residual needs it too."""
    model = tiny("gemma2")
    assert_close(step(applied(model), **batch()), step(model, **batch()))
    x, weight = torch.randn(4, 16).requires_grad_(), torch.rand(16).requires_grad_()
    incoming = torch.randn(4, 16)
    kept = incoming.clone()
    rms_norm(x, weight, 1e-6).backward(incoming)
    assert torch.equal(incoming, kept)
    rivals.liger_rms_norm(x, weight, incoming)
    assert not torch.equal(incoming, kept)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_in_bfloat16_are_as_near(name: str) -> None:
    """huggingface/kernels-community#105: logits 0.125 from vanilla's. Ours are as near to the truth as those are."""
    model = tiny(name)
    truth = copy.deepcopy(model).double().eval()(**batch()).logits
    half = copy.deepcopy(model).bfloat16().eval()
    found = [m(**batch()).logits for m in (applied(half), half)]
    steps = [Step(logits.float().square().mean(), {"logits": logits}) for logits in (*found, truth)]
    assert_as_good(*steps, torch.bfloat16)


def test_norms_train_in_full_fine_tuning() -> None:
    """unslothai/unsloth#45, #832, #4533, #4550: the backward of the norm returned None for its weight."""
    ours = accel.apply(untied())
    norms = {name: p.detach().clone() for name, p in ours.named_parameters() if "norm" in name}
    assert len(norms) == 5
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, weight_decay=0.0)
    step(ours, **batch())
    optimizer.step()
    moves = [(p.detach() - norms[name]).abs().min() for name, p in ours.named_parameters() if name in norms]
    assert min(moves) > 1e-4
    weight = torch.ones(8, requires_grad=True)
    rivals.WeightlessNorm.apply(torch.randn(2, 8, requires_grad=True), weight).sum().backward()
    assert weight.grad is None


RENAMED = {
    "from ...": "from transformers.",
    "from .configuration_llama": "from transformers.models.llama",
    "LlamaRMSNorm": "LlamaScale",
    "LlamaMLP": "LlamaFeedForward",
    "LlamaAttention": "LlamaMixer",
    "apply_rotary_pos_emb": "turn",
    "rotate_half": "quarter",
    "self.mlp": "self.feed",
    "self.norm": "self.last",
    "input_layernorm": "before",
    "post_attention_layernorm": "between",
    "CausalLMOutputWithPast": "LanguageOutput",
}


@pytest.fixture
def next_release(tmp_path: Path) -> Iterator[ModuleType]:
    """The file of a model with its classes, functions and modules renamed, as in another release."""
    text = Path(modeling_llama.__file__).read_text(encoding="utf-8")
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    text = text.replace("    LanguageOutput,\n", "    CausalLMOutputWithPast as LanguageOutput,\n", 1)
    file = tmp_path / "modeling_next.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("modeling_next", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["modeling_next"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["modeling_next"]


def test_a_transformers_release_cannot_break_imports(next_release: ModuleType) -> None:
    """axolotl-ai-cloud/axolotl#2767; linkedin/Liger-Kernel#1169, huggingface/trl#3480: names of classes and files that were gone."""
    torch.manual_seed(0)
    model = next_release.LlamaForCausalLM(untied().config).train()
    assert type(model.model.last).__name__ == "LlamaScale"
    assert not hasattr(model.model.layers[0], "mlp")
    expected = step(copy.deepcopy(model), **batch())
    report = accel.report(accel.apply(model))
    assert {fusion: report.places(fusion) for fusion in CAUSAL["llama"]} == CAUSAL["llama"]
    assert_close(step(model, **batch()), expected)


def test_no_architecture_is_imported_by_name() -> None:
    """linkedin/Liger-Kernel#1109, #1123, #1192: a new list entry, and a copied forward, for each new model."""
    package = Path(accel.__file__).parent
    files = [*package.glob("*.py"), *(package / "kernels").rglob("*.py"), *(package / "patches").rglob("*.py")]
    assert len(files) > 40
    assert [file for file in files if "transformers.models." in file.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_fused_weights(name: str) -> None:
    """linkedin/Liger-Kernel#978, #958, #1019, #1045, #1079: experts that are no list of MLPs any more."""
    model = tiny(name, num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ours = applied(model)
    assert_close(step(ours, **batch()), step(model, **batch()))
    assert accel.report(ours).places("experts") == accel.report(ours).counts.fused["experts"] == 2


@pytest.mark.parametrize("group", ["root only", "layers", "layers, head"])
def test_fsdp2_head(mesh: Any, group: str) -> None:
    """linkedin/Liger-Kernel#332, #1048; LLaMA-Factory#5941, #5879: the loss read a weight that is a flat shard."""
    model = untied()
    expected = step(model, **batch())
    ours = shard(accel.apply(model), mesh, group)
    assert_close(whole(step(ours, **batch())), expected)
    assert accel.report(ours).counts.fused["loss"] == SHARDINGS[group] / 2 == 1
    with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor|DTensor"):
        rivals.liger_loss(torch.randn(8, 32), ours.lm_head.weight, torch.arange(8))


def test_zero3_head() -> None:
    """huggingface/trl#3368, #5891, #6372, #4544: under ZeRO-3 a weight is empty unless its module runs; size mismatch."""
    model = untied()
    expected = step(model, **batch())
    ours = applied(model)
    partition = Partition(ours.lm_head)
    got = step(ours, **batch())
    assert_close(Step(got.loss, {**got.gradients, "lm_head.weight": partition.gradient}), expected)
    assert partition.gathered >= 2
    assert ours.lm_head.weight.numel() == 0
    report = accel.report(ours)
    assert (report.counts.fused["loss"], report.materialised_logits) == (1, 0)
    vanilla = copy.deepcopy(model)
    Partition(vanilla.lm_head)
    with pytest.raises((RuntimeError, ZeroDivisionError)):  # of sizes that do not fit, or of none
        rivals.liger_head(vanilla)(**batch())


def test_a_model_that_is_built_after_liger_has_changed_everything() -> None:
    """linkedin/Liger-Kernel#242: rotary functions of its kernels are left alone: a probe made its kernel write where it may not."""
    expected = step(untied(), **batch())
    with rivals.ligers_globals(untied()), runnable():
        model = accel.apply(untied())
        report = accel.report(model)
        assert {fusion: report.places(fusion) for fusion in ("norm", "mlp", "rope")} == {"norm": 0, "mlp": 0, "rope": 0}
        refused = [str(refusal) for fusion, refusal in report.refusals if fusion == "rope"]
        assert len(refused) == 2
        assert all("its rotary function is Liger-Kernel's" in text for text in refused)
        assert_close(step(model, **batch()), expected)


def test_a_cross_entropy_that_is_replaced_after_apply() -> None:
    """linkedin/Liger-Kernel#242: everybody's cross entropy becomes Liger's, which takes pointers, and knows no lazy logits."""
    expected = step(untied(), **batch())
    model = accel.apply(untied())
    with rivals.ligers_globals(untied()), runnable():
        assert_close(step(model, **batch()), expected)
    report = accel.report(model)
    assert report.counts.fused["loss"] == 0
    assert [why for why in report.counts.passed_on if "torch's cross_entropy was replaced by liger_kernel" in why]


def test_offloaded_head() -> None:
    """huggingface/accelerate#3870: a weight that is elsewhere, and comes for its module's forward alone."""
    model = untied()
    expected = step(model, **batch())
    ours = applied(model)
    accelerate.cpu_offload(ours.lm_head, execution_device="cpu")
    assert ours.lm_head.weight.device.type == "meta"
    loss = ours(**batch()).loss
    torch.testing.assert_close(loss.detach(), expected.loss)
    assert accel.report(ours).materialised_logits == 0


def test_replicas_of_data_parallel() -> None:
    """unslothai/unsloth#1707, #3915, #1074, #2735; LLaMA-Factory#5635: one GPU only. Two processes: tests/loops/test_distributed.py."""
    model = untied()
    expected = model(**batch())
    replica = accel.apply(model)._replicate_for_data_parallel()
    assert type(replica(**batch()).logits) is torch.Tensor
    torch.testing.assert_close(replica(**batch()).loss, expected.loss)


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_every_row_of_the_table_has_its_tests_or_a_reason(row: Row) -> None:
    assert bool(row.tests) != bool(row.why_not)
    for module, names in (row.tests or {}).items():
        assert [name for name in names if not callable(getattr(importlib.import_module(module), name, None))] == []


def test_every_known_failure_is_in_the_table() -> None:
    named = {name for row in ROWS.values() for module, names in (row.tests or {}).items() for name in names}
    ours = [name for file in (LOSS, MODELS) for name in vars(importlib.import_module(file)) if name.startswith("test_")]
    assert {name for name in ours if "table" not in name} <= named
