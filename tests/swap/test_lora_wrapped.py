"""Fused LoRA layers in what users put around a model: checkpointing, FSDP2, torch.compile, autocast, accumulation."""

import copy
from typing import Any

import peft
import pytest
import torch

import automodel_accel as accel
from automodel_accel.config import AccelConfig
from automodel_accel.kernels import lora as lora_kernel
from automodel_accel.kernels.facts import this_machine
from automodel_accel.kernels.lora import eager as lora_eager
from automodel_accel.patches import linear_proof
from automodel_accel.patches import lora as lora_patch
from automodel_accel.patches.linear import LinearPatch
from automodel_accel.plan import make_plan
from automodel_accel.prove import _run as run
from tests.budgets.layers import LINEARS
from tests.swap.compare import Step, assert_as_good, assert_close, gradients, step
from tests.swap.test_wrappers import SHARDINGS, shard, whole
from tests.tiny import batch, tiny


def pair(dropout: float = 0.1, recompute: str | None = None, **sizes: Any) -> tuple[Any, Any]:
    """Ours and PEFT's, equal."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=LINEARS, lora_dropout=dropout, init_lora_weights=False)
    theirs = peft.get_peft_model(tiny(**sizes), config).train()
    ours = accel.apply(copy.deepcopy(theirs), recompute=recompute)
    return ours, theirs


def seeded(model: Any, **inputs: Any) -> Step:
    torch.manual_seed(5)
    return step(model, **inputs)


@pytest.mark.parametrize("recompute", [None, "selective"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, recompute: str | None) -> None:
    """A layer that runs again draws its masks again."""
    ours, theirs = pair(recompute=recompute)
    for model in (ours, theirs):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert_close(seeded(ours, **batch()), seeded(theirs, **batch()))
    # a reentrant checkpoint runs without gradients first, which is PEFT's
    assert accel.report(ours).counts.fused["linear"] == (1 if reentrant else 2) * 8


@pytest.mark.parametrize("reentrant", [True, False])
def test_where_torch_draws_other_masks_than_ours(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: layers are proved by masks put in the place of PEFT's, and a checkpoint drops the same elements twice."""
    for package in (lora_patch, linear_proof):
        monkeypatch.setattr(package, "masks_are_torchs", lambda device: False)
    for package in (lora_eager, linear_proof):
        monkeypatch.setattr(package, "draw_mask", lambda x, p: 1 - lora_kernel.draw_mask(x, 1 - p))
    ours, theirs = pair(dropout=0.3)
    expected = seeded(ours, **batch())
    assert accel.report(ours).counts.fused["linear"] == 8
    assert expected.loss != seeded(theirs, **batch()).loss
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    assert_close(seeded(ours, **batch()), expected)


@pytest.mark.parametrize("group", SHARDINGS)
def test_fully_shard(group: str, mesh: Any) -> None:
    ours, theirs = (model.get_base_model() for model in pair(tie_word_embeddings=False))
    expected = seeded(theirs, **batch())
    shard(ours, mesh, group)
    for _ in range(2):
        assert_close(whole(seeded(ours, **batch())), expected)
    assert accel.report(ours).counts.fused["linear"] == 2 * 8


def test_compiled() -> None:
    """torch.compile takes PEFT's own layers."""
    torch._dynamo.reset()
    ours, theirs = pair(dropout=0.0)
    loss = torch.compile(ours, backend="aot_eager")(**batch()).loss
    loss.backward()
    assert_close(Step(loss.detach(), gradients(ours)), seeded(theirs, **batch()))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_autocast_and_accumulation(dropout: float) -> None:
    """Two micro-batches in bfloat16, with adapters in float32 as PEFT keeps them."""
    steps = []
    ours, theirs = pair(dropout)
    for model, autocast in ((ours, True), (theirs, True), (theirs, False)):
        model.zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = [model(**batch(ignored=ignored)).loss for ignored in (3, 9)]
        torch.stack(losses).sum().backward()
        steps.append(Step(sum(losses).detach(), gradients(model)))  # type: ignore[union-attr]
    assert_as_good(*steps, torch.bfloat16)
    assert accel.report(ours).counts.fused["linear"] == 2 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_proof_is_not_decided_by_rounding(dtype: torch.dtype) -> None:
    """Its values are exact in every call, forward and backward, with PEFT and with ours."""
    _, theirs = pair()
    theirs.to(dtype)
    patch = LinearPatch()
    only_linears = AccelConfig(
        **dict.fromkeys(("norm", "mlp", "experts", "rope", "attention", "residual", "loss"), False)
    )
    plan = make_plan(theirs, only_linears, this_machine(), (patch,))
    modules = dict(theirs.named_modules())
    for claim in {claim.proof_key: claim for claim in plan.claims}.values():
        for key in patch.keys(claim, "cpu"):
            experiment = patch.experiment(claim, modules[claim.paths[-1]], key, "torch")
            truth = run(experiment.truth, experiment, torch.float64)
            for function in (experiment.theirs, experiment.ours):
                for name, found in run(function, experiment, None).items():
                    assert torch.equal(found.double(), truth[name]), f"{key}: {name}"
