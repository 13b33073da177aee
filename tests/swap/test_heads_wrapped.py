"""Adapted heads inside of what shards, replicates and compiles a model."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import automodel_accel as accel
from tests.swap.compare import Step, assert_as_good, assert_close, gradients, step
from tests.swap.test_heads import BEFORE, FUSED, HEAD, pair, same_step
from tests.swap.test_wrappers import whole
from tests.tiny import batch, tiny

CONFIGS = pytest.mark.parametrize("config", [HEAD, FUSED["saved"]], ids=["lora", "saved"])


@pytest.mark.slow
@CONFIGS
@BEFORE
def test_compiled(config: dict[str, Any], before: bool) -> None:
    """Exact; and one graph with the fused operation in it where the adapter was there, or one step was taken, before."""
    torch._dynamo.reset()
    ours, vanilla = pair(before, **config)
    expected = step(vanilla, **batch())
    graphs: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return aot_eager(graph, inputs)

    for warm in (False, True):
        graphs.clear()
        compiled = torch.compile(ours, backend=look, fullgraph=True)
        ours.zero_grad()
        loss = compiled(**batch()).loss
        loss.backward()
        assert_close(Step(loss.detach(), gradients(ours)), expected)
        if warm or not before or config is not HEAD:
            assert "automodel_accel.linear_cross_entropy" in graphs[0]
        assert len(graphs) == 1
        torch._dynamo.reset()
        step(ours, **batch())


@CONFIGS
@BEFORE
@pytest.mark.parametrize("find_unused", [True, False])
@pytest.mark.usefixtures("mesh")
def test_distributed_data_parallel(config: dict[str, Any], before: bool, find_unused: bool) -> None:
    ours, vanilla = pair(before, **config)
    wrapped = nn.parallel.DistributedDataParallel(ours, find_unused_parameters=find_unused)
    expected = step(vanilla, **batch())
    for _ in range(2):
        ours.zero_grad()
        loss = wrapped(**batch()).loss
        loss.backward()
        assert_close(Step(loss.detach(), gradients(ours)), expected)
    assert accel.report(ours).counts.fused["loss"] == 2
    assert accel.report(ours).materialised_logits == 0


SHARDINGS: dict[str, int] = {
    "root only": 2,
    "layers": 2,
    "layers, head": 0,
    "layers, head kept": 2,
    "layers, base of the head": 2,
    "layers, norm and head together": 0,
    "layers, every linear of the head": 0,
}


def shard(wrapped: Any, mesh: Any, group: str, **settings: Any) -> Any:
    """fully_shard in the ways that people do it, and in others."""
    model = wrapped.base_model.model
    head = model.lm_head
    units: list[Any] = {
        "root only": [],
        "layers": [],
        "layers, head": [head],
        "layers, head kept": [head],
        "layers, base of the head": [next(m for m in head.modules() if isinstance(m, nn.Linear))],
        "layers, norm and head together": [[model.model.norm, head]],
        "layers, every linear of the head": [m for m in head.modules() if isinstance(m, nn.Linear)],
    }[group]
    for unit in [*(model.model.layers if group != "root only" else []), *units]:
        fully_shard(unit, mesh=mesh, reshard_after_forward="kept" not in group, **settings)
    return fully_shard(wrapped, mesh=mesh, **settings)


@BEFORE
@pytest.mark.parametrize(("group", "fused"), SHARDINGS.items(), ids=SHARDINGS)
def test_fully_shard(mesh: Any, group: str, fused: int, before: bool) -> None:
    ours, vanilla = pair(before, **HEAD)
    expected = step(vanilla, **batch())
    ours = shard(ours, mesh, group)
    for _ in range(2):
        assert_close(whole(step(ours, **batch())), expected)
    report = accel.report(ours)
    assert report.counts.fused["loss"] == fused
    assert fused or report.materialised_logits == 2 or any("FSDP2 drops" in why for why in report.counts.passed_on)


@BEFORE
@pytest.mark.parametrize("group", ["root only", "layers", "layers, head"])
def test_fully_shard_with_a_saved_head(mesh: Any, group: str, before: bool) -> None:
    ours, vanilla = pair(before, **FUSED["saved"])
    expected = step(vanilla, **batch())
    ours = shard(ours, mesh, group)
    for _ in range(2):
        assert_close(whole(step(ours, **batch())), expected)
    assert accel.report(ours).counts.fused["loss"] == (0 if "head" in group else 2)


@BEFORE
def test_fully_shard_in_mixed_precision(mesh: Any, before: bool) -> None:
    ours, vanilla = pair(before, **HEAD)
    truth = step(copy.deepcopy(vanilla), **batch())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mine, theirs = (shard(model, mesh, "layers", mp_policy=policy) for model in (ours, vanilla))
    assert_as_good(whole(step(mine, **batch())), whole(step(theirs, **batch())), truth, torch.bfloat16)
    assert accel.report(ours).counts.fused["loss"] == 1


def _one_of_two_ranks(rank: int, store: str) -> None:
    """Each rank has its own rows; the gradient is the mean of both ranks'."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    rows = [{name: rows[2 * r : 2 * r + 2] for name, rows in batch(rows=4).items()} for r in range(2)]
    for before in (True, False):
        for group in ("root only", "layers", "layers, head kept", "replicated"):
            ours, vanilla = pair(before, **HEAD)
            both = [step(vanilla, **inputs) for inputs in rows]
            mean = {name: (both[0].gradients[name] + both[1].gradients[name]) / 2 for name in both[0].gradients}
            if group == "replicated":
                wrapped: Any = nn.parallel.DistributedDataParallel(ours)
                loss = wrapped(**rows[rank]).loss
                loss.backward()
                found = Step(loss.detach(), gradients(ours))
            else:
                found = whole(step(shard(ours, mesh, group), **rows[rank]))
            assert_close(found, Step(both[rank].loss, mean))
            assert accel.report(ours).counts.fused["loss"] == 1
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_one_of_two_ranks, (str(tmp_path / "store"),), nprocs=2)


@BEFORE
@pytest.mark.parametrize("tied", [True, False])
def test_adapters_of_tokens_are_exact_and_counted(tied: bool, before: bool) -> None:
    """PEFT multiplies by a weight of its own there, and asks no linear."""
    model = tiny(tie_word_embeddings=tied)
    ours, vanilla = pair(before, model, target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 5]})
    same_step(ours, vanilla)
    report = accel.report(ours)
    assert report.counts.fused["loss"] == 0
    if before:
        reason = "loss: the head is a TrainableTokensWrapper now, not the one that was proved"
        assert report.counts.passed_on == {reason: 1}
    else:
        assert any(
            "the output head is a peft.utils.other.TrainableTokensWrapper" in str(no) for _, no in report.refusals
        )


def test_a_head_whose_weight_alone_is_used_is_counted() -> None:
    model = tiny(tie_word_embeddings=False)
    ours = accel.apply(copy.deepcopy(model))
    for one in (ours, model):
        head = one.lm_head
        one.get_output_embeddings = lambda head=head: head
        one.lm_head = nn.Sequential()
        one.lm_head.forward = lambda x, head=head: nn.functional.linear(x, head.weight)
    assert_close(step(ours, **batch()), step(model, **batch()))
    assert accel.report(ours).counts.passed_on == {
        "loss: the head's linear was not called; its weight is used by something else": 1
    }


def test_every_fusion_with_everything_adapted() -> None:
    for before in (True, False):
        for name in ("llama", "gemma3_text", "qwen3"):
            model = tiny(name, tie_word_embeddings=False)
            ours, vanilla = pair(before, model, target_modules=".*(proj|lm_head)", r=4, lora_dropout=0.2)
            same_step(ours, vanilla)
            accel.revert(ours)
            same_step(ours, vanilla)
