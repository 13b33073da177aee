"""Training of adapters with dropout, as by PEFT alone: in bfloat16, with micro-batches, and with layers that run twice."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import automodel_accel as accel
from bench.e2e.agreement import curves
from bench.e2e.agreement import gradients as agreement_of_gradients
from bench.e2e.variants import move_by_a_rounding
from tests.budgets.layers import LINEARS
from tests.loops import runs
from tests.loops.runs import Feature
from tests.swap.compare import assert_close, step
from tests.tiny import batch, tiny

STEPS, DROPOUT = 20, 0.1


def adapted(dropout: float = DROPOUT, **config: Any) -> Any:
    """PEFT's, in float32."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": LINEARS, "lora_dropout": dropout, "init_lora_weights": False, **config}
    return peft.get_peft_model(tiny(), peft.LoraConfig(**settings)).train()


def twenty(model: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of twenty steps, and AdamW's means of the gradients at their end."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-3, eps=1e-5)
    torch.manual_seed(1)
    losses = []
    for i in range(STEPS):
        loss = model(**batch(rows=2 + i % 2, ignored=3 + i % 4)).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: optimizer.state[p]["exp_avg"].flatten().float() for name, p in trained.items()}


def in_bfloat16(model: Any) -> Any:
    return model.bfloat16()


def with_wide_adapters(model: Any) -> Any:
    """As PEFT keeps them by default."""
    model.bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize(
    ("narrow", "dropout"), [(in_bfloat16, 0.0), (with_wide_adapters, DROPOUT)], ids=["bfloat16", "adapters in float32"]
)
def test_twenty_steps_in_bfloat16(narrow: Callable[[Any], Any], dropout: float) -> None:
    """With the same masks: no farther from PEFT's than PEFT's from weights that were moved by a rounding; see bench/e2e/agreement.py."""
    theirs = narrow(adapted(dropout, init_lora_weights=True))
    ours, moved = accel.apply(copy.deepcopy(theirs)), [copy.deepcopy(theirs) for _ in range(4)]
    for seed, model in enumerate(moved, 1):
        move_by_a_rounding(model, seed)
    (losses, means), (their_losses, their_means), *others = map(twenty, (ours, theirs, *moved))
    found = curves(losses, their_losses, [other[0] for other in others])
    assert found["loss_agrees"], found
    found = agreement_of_gradients(means, their_means, [other[1] for other in others])
    assert found["gradients_agree"], found
    assert losses[-1] < losses[0]
    assert accel.report(ours).counts.fused["linear"] == STEPS * 8
    assert accel.report(ours).counts.passed_on == {}


@pytest.mark.parametrize(
    ("recompute", "reentrant"), [(None, None), (None, False), ("selective", True), ("selective", None), ("full", None)]
)
def test_accumulation_and_checkpointing_with_dropout(
    recompute: str | None, reentrant: bool | None, tmp_path: Path
) -> None:
    theirs = adapted()
    ours = accel.apply(copy.deepcopy(theirs), recompute=recompute)
    feature = Feature(reentrant=reentrant)
    done, vanilla = (runs.run(runs.plain, model, feature, tmp_path) for model in (ours, theirs))
    runs.assert_same(done, vanilla)
    runs.assert_fused(done)


def test_training_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    """Adapters, optimizer and random state: the steps after are those of a training that was not interrupted."""
    theirs = adapted()
    ours = accel.apply(copy.deepcopy(theirs))
    twenty(ours)
    ours.save_pretrained(tmp_path)
    random = torch.get_rng_state()
    again = peft.PeftModel.from_pretrained(tiny(), str(tmp_path), is_trainable=True).train()
    accel.apply(again)
    torch.set_rng_state(random)
    found = step(again, **batch())
    torch.set_rng_state(random)
    assert_close(found, step(ours, **batch()))
