"""Every training loop with every feature: eight optimizer steps of an applied model equal vanilla's.

A row of the matrix is a feature, a column a loop (`runs.LOOPS`); a cell compares every loss, the weights, the direction in which
each moved, and what was looked at between steps, and asks the report whether the fusions ran. Cells that add nothing are left
out (`adds`): accelerate hands the model on as it is unless it casts, so what happens between steps or inside of layers is the
plain loop's; a compiled step is compiled by the Trainer through accelerate, and by hand in tests/swap; the Trainer whose callback
applies the model differs in the moment of it. What only the Trainer has is in test_matrix_trainer.py, adapters are in
test_matrix_peft.py.
"""

import copy
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import automodel_accel as accel
from tests.loops import runs
from tests.loops.runs import APPLYING, LOOPS, MICRO_BATCHES, Feature, Run
from tests.tiny import tiny

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {"tie_word_embeddings": False}),
    "tied, soft-capped": ("gemma2", {"tie_word_embeddings": True}),
    "layer norms": ("gpt_neox", {"tie_word_embeddings": False, "use_parallel_residual": False}),
    "dropout": ("gpt_neox", {"tie_word_embeddings": False, "use_parallel_residual": False, "hidden_dropout": 0.2}),
}


def look(model: Any, step: int, seen: list[Any]) -> None:
    """Greedy text after every other step, held-out losses and logits after every third."""
    if step % 2 == 0:
        prompt = runs.padded(runs.rows(1, seed=1))["input_ids"][:, :5]
        seen.append(model.eval().generate(prompt, max_new_tokens=4, do_sample=False))
    if step % 3 == 0:
        seen.append(runs.evaluate(model))


def evaluate_a_copy(model: Any, step: int, seen: list[Any]) -> None:
    """What callbacks that keep the best model, or publish one, do."""
    seen.append(runs.evaluate(copy.deepcopy(model)))


def average(model: Any, step: int, seen: list[Any]) -> None:
    """An exponential moving average, which is a deep copy that is written to."""
    if step == 1:
        seen.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8)))
    seen[0].update_parameters(model)
    seen.append(runs.evaluate(seen[0]))
    if step == runs.STEPS:
        seen.pop(0)


FEATURES: dict[str, tuple[str, Feature]] = {
    "items as int": ("untied", Feature(items=int)),
    "items as tensor": ("tied, soft-capped", Feature(items=torch.Tensor)),
    "no items": ("layer norms", Feature(items=None)),
    "shift_labels": ("untied", Feature(collate=runs.with_shift_labels)),
    "padding-free": ("tied, soft-capped", Feature(collate=runs.flattened)),
    "generate and evaluate between": ("tied, soft-capped", Feature(between=look)),
    "a copy evaluated": ("untied", Feature(between=evaluate_a_copy)),
    "moving average": ("layer norms", Feature(between=average)),
    "checkpoints, reentrant": ("tied, soft-capped", Feature(reentrant=True)),
    "checkpoints": ("untied", Feature(reentrant=False)),
    "label smoothing": ("tied, soft-capped", Feature(smoothing=0.1)),
    "dropout": ("dropout", Feature()),
    "compiled": ("untied", Feature(compiled=True, collate=runs.of_one_shape)),
}
# and the one in float32 that it is compared with
HALF: dict[str, tuple[Feature, str]] = {
    "bf16": (Feature(bf16=True), "items as int"),
    "bf16, soft-capped": (Feature(bf16=True, items=torch.Tensor), "items as tensor"),
    "bf16, checkpoints": (Feature(bf16=True, items=None, reentrant=False), "no items"),
    "bf16, label smoothing": (Feature(bf16=True, smoothing=0.1), "label smoothing"),
}
# of the Trainer's features those that the moment of `apply` could change
CALLBACK = [
    FEATURES[name][1] for name in ("items as tensor", "generate and evaluate between", "checkpoints, reentrant")
]
CALLBACK += [HALF["bf16"][0]]


@cache
def vanilla(loop: str, name: str) -> Run:
    """Vanilla's run, once for the float32 and the bfloat16 test of a loop. Never compiled: it is the same computation."""
    model, feature = FEATURES[name]
    with tempfile.TemporaryDirectory() as folder:
        return runs.run(LOOPS[loop], build(model), replace(feature, compiled=False), Path(folder))


def build(name: str) -> Any:
    """The model of that name."""
    kind, config = MODELS[name]
    return tiny(kind, **config)


@cache
def applied(name: str) -> Any:
    """An applied model, to be copied."""
    return accel.apply(build(name))


def given(loop: str, name: str) -> Any:
    """What our run of a loop is given: an applied model, or one that the loop applies."""
    return build(name) if loop in APPLYING else runs.copied(applied(name))


def losses_of(loop: str, feature: Feature) -> int:
    """How many losses without logits: the Trainer smooths the logits of a forward without labels; a user's loss is a second one."""
    if feature.smoothing:
        return 0 if loop in ("trainer", "callback") else 2 * MICRO_BATCHES
    return MICRO_BATCHES


def adds(loop: str, feature: Feature) -> bool:
    """Whether this cell can show what no other does."""
    if loop == "accelerate":
        return feature.between is None and feature.reentrant is None and not feature.compiled
    if loop == "callback":
        return feature in CALLBACK
    return loop != "plain" or not feature.compiled


def cells(features: dict[str, Feature]) -> Any:
    """The cells of these rows."""
    return pytest.mark.parametrize(
        ("loop", "name"), [(loop, name) for name, feature in features.items() for loop in LOOPS if adds(loop, feature)]
    )


@cells({name: feature for name, (_, feature) in FEATURES.items()})
def test_exact(loop: str, name: str, tmp_path: Path) -> None:
    model, feature = FEATURES[name]
    done = runs.run(LOOPS[loop], given(loop, model), feature, tmp_path)
    runs.assert_same(done, vanilla(APPLYING.get(loop, loop), name))
    if feature.compiled:  # what is in a graph is not counted
        assert "GeneratedBackwardFor_automodel_accel_linear_cross_entropy_defaultBackward" in done.nodes
    else:
        runs.assert_fused(done, losses_of(loop, feature))


@cells({name: feature for name, (feature, _) in HALF.items()})
def test_as_exact_as_vanilla_in_bfloat16(loop: str, name: str, tmp_path: Path) -> None:
    feature, whole = HALF[name]
    model, _ = FEATURES[whole]
    same = APPLYING.get(loop, loop)
    theirs = runs.run(LOOPS[same], build(model), feature, tmp_path)
    done = runs.run(LOOPS[loop], given(loop, model), feature, tmp_path)
    runs.assert_as_good(done, theirs, vanilla(same, whole))
    runs.assert_fused(done, losses_of(loop, feature))


@pytest.mark.parametrize("name", ["untied", "tied, soft-capped"])
def test_optimizer_in_backward(name: str) -> None:
    """Each weight is changed as soon as its gradient is there, and the gradient freed: nothing may need either later."""

    def loop(model: Any, feature: Feature, folder: Path) -> Run:
        def update(weight: torch.Tensor) -> None:
            with torch.no_grad():
                weight.sub_(weight.grad, alpha=0.02)  # type: ignore[arg-type]
            weight.grad = None

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        done = Run(model)
        for batches in runs.steps(feature):
            for inputs in batches:
                loss = model(**inputs).loss
                done.saw(loss)
                loss.backward()
        return done

    done = [runs.run(loop, model, Feature(), Path()) for model in (runs.copied(applied(name)), build(name))]
    runs.assert_same(*done)
    runs.assert_fused(done[0])
