"""Adapters in every training loop: put on before `apply` or after it, on the head or as a copy of it, merged and switched off."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import automodel_accel as accel
from tests.loops import runs
from tests.loops.runs import APPLYING, LOOPS, MICRO_BATCHES, Feature, Run
from tests.swap.test_heads import adapted
from tests.tiny import tiny

ADAPTERS: dict[str, dict[str, Any]] = {
    "head adapted": {"target_modules": ["q_proj", "down_proj", "lm_head"], "r": 3, "lora_alpha": 2},
    "head saved": {"target_modules": ["v_proj", "up_proj"], "r": 2, "modules_to_save": ["lm_head", "norm"]},
}
BOTH_ORDERS = pytest.mark.parametrize("before", [True, False], ids=["apply, then peft", "peft, then apply"])


def switch(model: Any, step: int, seen: list[Any]) -> None:
    """Losses with the adapters switched off, merged, and as they are trained, in evaluation and in training."""
    if step == STEP_TO_LOOK_AT:
        with model.disable_adapter():
            seen.append(losses(model))
        model.merge_adapter()
        seen.append(losses(model))
        model.unmerge_adapter()
        seen.append(losses(model))


def losses(model: Any) -> torch.Tensor:
    """Held-out losses and logits, and the loss of a training step."""
    held_out = runs.evaluate(model)
    return torch.cat([held_out, model.train()(**runs.padded(runs.rows(2, seed=1))).loss.detach()[None]])


STEP_TO_LOOK_AT, TRAINING_STEPS_LOOKED_AT = 4, 3
# what is worth seeing beside the adapters themselves; another loop runs without
FEATURES = {"plain": Feature(between=switch), "trainer": Feature(reentrant=True)}


@cache
def vanilla(loop: str, adapter: str) -> Run:
    """Vanilla's run, once for both orders."""
    model = adapted(tiny(tie_word_embeddings=False), **ADAPTERS[adapter])
    with tempfile.TemporaryDirectory() as folder:
        return runs.run(LOOPS[loop], model, FEATURES.get(loop, Feature()), Path(folder))


@cache
def applied(adapter: str, before: bool) -> Any:
    """An applied model with adapters, to be copied."""
    model = tiny(tie_word_embeddings=False)
    if before:
        return adapted(accel.apply(model), **ADAPTERS[adapter])
    return accel.apply(adapted(model, **ADAPTERS[adapter]))


@BOTH_ORDERS
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("loop", sorted(LOOPS.keys() - APPLYING))
def test_exact(loop: str, adapter: str, before: bool, tmp_path: Path) -> None:
    done = runs.run(LOOPS[loop], runs.copied(applied(adapter, before)), FEATURES.get(loop, Feature()), tmp_path)
    runs.assert_same(done, vanilla(loop, adapter))
    runs.assert_fused(done, MICRO_BATCHES + (TRAINING_STEPS_LOOKED_AT if loop == "plain" else 0))
