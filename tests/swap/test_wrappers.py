"""What users put around a model: gradient checkpointing, torch.compile, LoRA, FSDP2, accelerate, torch.func."""

import copy
from collections.abc import Iterator
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import automodel_accel as accel
from tests.swap.compare import Step, applied, assert_as_good, assert_close, assert_equal, gradients, step
from tests.tiny import CAUSAL, batch, tiny


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = tiny(name)
    ours = applied(model)
    for m in (ours, model):
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        m.enable_input_require_grads()
    assert_close(step(ours, **batch()), step(model, **batch()))
    report = accel.report(ours)
    assert report.counts.fused["loss"] == 1
    norms = report.counts.fused["norm"] + report.counts.fused["residual"]
    assert norms > CAUSAL[name]["norm"] or not CAUSAL[name]["norm"], "layers were not run again"
    assert report.materialised_logits == 0


# operations of ours in the graph of a step; on a CPU LayerNorm and gelu are torch's own
RMS = {"attention", "rms_norm", "add_rms_norm", "gated_linear", "rope", "linear_cross_entropy"}
GRAPHS = {"llama": RMS, "gemma2": RMS, "gpt_neox": {"attention", "rope", "linear_cross_entropy"}}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_compiled_whole(name: str) -> None:
    """One graph for every batch of a shape, as in vanilla, and the fused operations are in it, forward and backward."""
    torch._dynamo.reset()
    model = tiny(name)
    ours = applied(model)
    graphs: list[set[str]] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append({str(node.target) for node in graph.graph.nodes if "automodel_accel" in str(node.target)})
        return aot_eager(graph, inputs)

    compiled = torch.compile(ours, backend=look, fullgraph=True)
    for inputs in (batch(), {**batch(), "labels": batch()["input_ids"]}, batch()):
        ours.zero_grad()
        loss = compiled(**inputs).loss
        loss.backward()
        assert_close(Step(loss.detach(), gradients(ours)), step(model, **inputs))
    assert len(graphs) == 1
    found = {target.removeprefix("automodel_accel.").split(".")[0] for target in graphs[0]}
    assert found == GRAPHS[name]


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_compiled_whole_with_a_loss_module_built_in_the_forward(name: str) -> None:
    """No graph break, which would give parameters that nothing uses a gradient of zero."""
    torch._dynamo.reset()
    model = tiny(name)
    ours = applied(model)
    loss = torch.compile(ours, backend="aot_eager", fullgraph=True)(**batch()).loss
    loss.backward()
    assert_close(Step(loss.detach(), gradients(ours)), step(model, **batch()))
    eager = applied(model)
    step(eager, **batch())
    assert accel.report(eager).counts.fused["loss"] == 1


def test_logits_out_of_a_compiled_step() -> None:
    torch._dynamo.reset()
    model = tiny()
    compiled = torch.compile(applied(model), backend="eager")
    outputs = compiled(**batch())
    torch.testing.assert_close(outputs.logits.detach(), model(**batch()).logits.detach())
    torch.testing.assert_close(outputs.logits.shape, model(**batch()).logits.shape)


def test_model_compiled_before_it_is_applied() -> None:
    torch._dynamo.reset()
    model = tiny()
    expected = step(model, **batch())
    model.model.layers[0].mlp.compile(backend="eager")
    model.model.norm.compile(backend="eager")
    model.compile(backend="eager")
    step(model, **batch())
    report = accel.report(accel.apply(model))
    assert {fusion: report.places(fusion) for fusion in CAUSAL["llama"]} == CAUSAL["llama"]
    assert_close(step(model, **batch()), expected)
    accel.revert(model)
    assert_close(step(model, **batch()), expected)


def lora(model: nn.Module, **config: Any) -> nn.Module:
    """PEFT's LoRA, the same random A and B each time."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **{"target_modules": "all-linear", **config}))
    torch.manual_seed(4)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped.train()


LORA: dict[str, tuple[dict[str, Any], int]] = {
    "all linears": ({}, 1),
    "attention only": ({"target_modules": ["q_proj", "v_proj"]}, 1),
    "one linear of the mlp": ({"target_modules": ["up_proj"]}, 1),
    "rslora without dropout": ({"use_rslora": True, "lora_alpha": 3}, 1),
    "dora": ({"use_dora": True}, 1),
    "head saved": ({"modules_to_save": ["lm_head"]}, 1),
    "head adapted": ({"target_modules": ["q_proj", "down_proj", "lm_head"]}, 1),
    "norms saved": ({"modules_to_save": ["norm"]}, 1),
    "bias": ({"bias": "all"}, 1),
}


@pytest.mark.parametrize("before", [True, False], ids=["apply, then lora", "lora, then apply"])
@pytest.mark.parametrize(("config", "fused"), LORA.values(), ids=LORA)
def test_lora(config: dict[str, Any], fused: int, before: bool) -> None:
    model = tiny(tie_word_embeddings=False)
    vanilla = lora(copy.deepcopy(model), **config)
    ours = lora(accel.apply(model), **config) if before else accel.apply(lora(model, **config))
    theirs = step(vanilla, **batch())
    assert_close(step(ours, **batch()), theirs)
    report = accel.report(ours)
    assert report.counts.fused["loss"] == fused
    assert report.counts.fused["mlp"] == 2
    assert report.counts.fused["norm"] + report.counts.fused["residual"] == 5
    with vanilla.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(**batch()).loss, vanilla(**batch()).loss)
    for adapter in (vanilla, ours):
        adapter.merge_adapter()
    torch.testing.assert_close(ours(**batch()).loss, vanilla(**batch()).loss)
    for adapter in (vanilla, ours):
        adapter.unmerge_adapter()
    assert ours.state_dict().keys() == vanilla.state_dict().keys()
    accel.revert(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in vanilla.modules()]
    assert_close(step(ours, **batch()), theirs)


def test_lora_files_are_the_stock_files(tmp_path: Any) -> None:
    for name, make in (("theirs", lambda m: lora(m)), ("ours", lambda m: lora(accel.apply(m)))):
        make(tiny()).save_pretrained(tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_lora_merged_and_unloaded() -> None:
    model = tiny()
    merged = [lora(m).merge_and_unload().requires_grad_() for m in (applied(model), model)]
    assert_close(step(merged[0], **batch()), step(merged[1], **batch()))
    assert accel.report(merged[0]).materialised_logits == 0


def shard(model: nn.Module, mesh: Any, group: str) -> nn.Module:
    """fully_shard in the ways that people do it."""
    layers = list(model.model.layers)
    units: list[Any] = {
        "root only": [],
        "layers": layers,
        "layers, head": [*layers, model.lm_head],
        "layers, norm and head together": [*layers, [model.model.norm, model.lm_head]],
        "layers, norm and head together and kept": [*layers, [model.model.norm, model.lm_head]],
    }[group]
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward="kept" not in group)
    return fully_shard(model, mesh=mesh)


def whole(step: Step) -> Step:
    """With whole tensors for sharded gradients."""
    return Step(step.loss, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in step.gradients.items()})


SHARDINGS = {
    "root only": 2,
    "layers": 2,
    "layers, head": 2,
    "layers, norm and head together": 0,
    "layers, norm and head together and kept": 2,
}


@pytest.mark.parametrize(("group", "fused"), SHARDINGS.items(), ids=SHARDINGS)
def test_fully_shard(mesh: Any, group: str, fused: int) -> None:
    model = tiny(tie_word_embeddings=False)
    expected = step(model, **batch())
    ours = shard(accel.apply(model), mesh, group)
    for _ in range(2):
        assert_close(whole(step(ours, **batch())), expected)
    report = accel.report(ours)
    assert report.counts.fused["loss"] == fused
    assert report.materialised_logits == 0
    if not fused:
        assert any(
            "FSDP2 drops the head's weight together with other modules'; shard it alone" in why
            for why in report.counts.passed_on
        )
    with pytest.raises(
        ValueError, match=r"FSDP.* was derived from a swapped class after apply .*revert before wrapping"
    ):
        accel.revert(ours)
    assert_close(whole(step(ours, **batch())), expected)
    logits = ours(**batch()).logits
    torch.testing.assert_close(logits.detach(), tiny(tie_word_embeddings=False)(**batch()).logits.detach())


def test_apply_after_fully_shard(mesh: Any) -> None:
    """The weights are DTensors: norms and mlps are proved on copies, and the head is refused with its type."""
    model = tiny(tie_word_embeddings=False)
    expected = step(model, **batch())
    ours = accel.apply(shard(model, mesh, "layers"))
    assert_close(whole(step(ours, **batch())), expected)
    assert any("the head's weight is a DTensor: sharded" in str(refusal) for _, refusal in accel.report(ours).refusals)
    accel.revert(ours)
    assert_close(whole(step(ours, **batch())), expected)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its settings for the whole process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("find_unused", [True, False])
@pytest.mark.usefixtures("mesh")
def test_distributed_data_parallel(find_unused: bool) -> None:
    model = tiny()
    ours = applied(model)
    wrapped = nn.parallel.DistributedDataParallel(ours, find_unused_parameters=find_unused)
    for _ in range(2):
        ours.zero_grad()
        loss = wrapped(**batch()).loss
        loss.backward()
        assert_close(Step(loss.detach(), gradients(ours)), step(model, **batch()))
    assert accel.report(wrapped) is accel.report(ours)
    assert accel.report(ours).materialised_logits == 0


@pytest.mark.usefixtures("fresh_accelerate")
def test_trainer(tmp_path: Any) -> None:
    """Accumulation, an evaluation with metrics in between, and a saved model: the same losses, and stock files."""
    rows = [{"input_ids": row, "labels": row} for row in batch(rows=8)["input_ids"]]
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(tmp_path),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
        **{
            "logging_steps": 1,
            "eval_steps": 2,
            "eval_strategy": "steps",
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
        },
        **{"disable_tqdm": True, "learning_rate": 1e-3, "batch_eval_metrics": False},
    )
    histories: list[list[dict[str, float]]] = []
    ours = applied(tiny())
    for model in (ours, tiny()):
        seen: list[Any] = []
        trainer = transformers.Trainer(
            *(model, arguments),
            train_dataset=rows,
            eval_dataset=rows[:3],
            compute_metrics=lambda p, seen=seen: (
                seen.append(p.predictions) or {"shape": float(p.predictions.shape[-1])}
            ),
        )
        trainer.train()
        assert seen[0].shape == (3, 24, 97)
        names = ("loss", "eval_loss", "grad_norm", "eval_shape")
        histories.append([{key: row[key] for key in names if key in row} for row in trainer.state.log_history])
        trainer.save_model(str(tmp_path))
        assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]
    torch.testing.assert_close(*histories, rtol=1e-4, atol=1e-4)
    assert sum("loss" in row for row in histories[0]) == 3
    assert accel.report(ours).counts.fused["loss"] == 6
    assert accel.report(ours).materialised_logits == 0


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_prepare_and_unwrap() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = tiny()
    truth = step(model, **batch())
    ours, theirs = (accelerator.prepare(m) for m in (applied(model), copy.deepcopy(model)))
    assert_as_good(step(ours, **batch()), step(theirs, **batch()), truth, torch.bfloat16)
    assert accel.report(ours).counts.fused["loss"] == 1
    assert accel.report(ours).materialised_logits == 0
    unwrapped = accelerator.unwrap_model(accel.revert(ours), keep_fp32_wrapper=False)
    assert_close(step(unwrapped, **batch()), truth)


def test_functional_call() -> None:
    model = tiny(tie_word_embeddings=False)
    steps = []
    for m in (applied(model), model):
        leaves = {name: (p.detach() * 1.1).requires_grad_() for name, p in m.named_parameters()}
        loss = torch.func.functional_call(m, leaves, kwargs=batch()).loss
        loss.backward()
        steps.append(Step(loss.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}))
    assert len(steps[0].gradients) == len(list(model.parameters()))
    assert_close(*steps)


def test_a_second_derivative_raises_and_does_not_return_a_wrong_number() -> None:
    model = applied(tiny())
    weight = model.model.norm.weight

    def twice() -> torch.Tensor:
        (first,) = torch.autograd.grad(model(**batch()).loss, weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    with pytest.raises(RuntimeError, match="twice"):
        twice()


def test_moved_and_cast_after_apply() -> None:
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        model = tiny()
        ours = applied(model).to(dtype)
        mine, theirs = step(ours, **batch()), step(model.to(dtype), **batch())
        torch.testing.assert_close(mine.loss, theirs.loss, rtol=2e-2, atol=2e-2)
        assert {g.dtype for g in mine.gradients.values()} == {dtype}


def test_vocabulary_resized_after_apply() -> None:
    """The new head is an ordinary one: correct, no longer fused."""
    model = tiny()
    ours = applied(model)
    torch.manual_seed(0)
    ours.resize_token_embeddings(105, mean_resizing=False)
    torch.manual_seed(0)
    model.resize_token_embeddings(105, mean_resizing=False)
    assert_close(step(ours, **batch()), step(model, **batch()))
    accel.revert(ours)
    assert_close(step(ours, **batch()), step(model, **batch()))


def test_gradients_of_a_reverted_model_are_vanilla_after_everything() -> None:
    model = tiny()
    expected = step(model, **batch())
    accel.apply(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step(model, **batch())
    model.gradient_checkpointing_disable()
    accel.revert(model)
    assert_equal(step(model, **batch()), expected)
    assert gradients(model).keys() == expected.gradients.keys()
