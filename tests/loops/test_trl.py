"""TRL's SFTTrainer and DPOTrainer: eight steps of ours equal vanilla's, applied before the trainer or by its callback.

Both trainers bring a loss of their own, which also gives the metrics that they log: it takes the hidden states and the head's
weight, and builds no logits. So the loss stays theirs, and everything before it is ours.
"""

import copy
import re
import runpy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import accelerate
import peft
import pytest
import torch
from trl import SFTTrainer

import automodel_accel as accel
from automodel_accel.callback import AccelCallback
from tests.loops import runs, trl_runs
from tests.loops.trl_runs import Case, Trained, dpo, prompts, sft, train
from tests.swap.compare import Step, assert_close

MICRO_BATCHES = 16
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "trl_sft.py"


def lora(**config: Any) -> peft.LoraConfig:
    """Adapters whose first product is not zero, so that both of its matrices have a gradient."""
    return peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="gaussian", **config)


def accuracy(prediction: Any) -> dict[str, float]:
    """Of the most probable tokens; takes real logits."""
    logits = torch.as_tensor(prediction.predictions)
    return {"square": float(logits.nan_to_num().square().mean()), "rows": float(len(logits))}


EVERYWHERE = {"target_modules": "all-linear"}
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 4}
CASES: dict[str, tuple[Any, Case]] = {
    "sft": (sft, Case(arguments=EVALUATING)),
    "sft, packed": (sft, Case(arguments={"packing": True, "max_length": 40})),
    "sft, packed and cut": (sft, Case(arguments={"packing": True, "max_length": 40, "packing_strategy": "wrapped"})),
    "sft, padding-free": (sft, Case(arguments={"padding_free": True, "max_length": None})),
    "sft, assistant only, reentrant checkpoints": (
        sft,
        Case(arguments={"assistant_only_loss": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ),
    "sft, completion only, dft, no checkpoints": (
        sft,
        Case(
            arguments={"completion_only_loss": True, "loss_type": "dft", "gradient_checkpointing": False}, rows=prompts
        ),
    ),
    "sft, label smoothing": (sft, Case(arguments={"label_smoothing_factor": 0.1})),
    "sft, peft": (sft, Case(arguments=EVALUATING, trainer={"peft_config": lora(**EVERYWHERE)})),
    "sft, peft with a saved head": (sft, Case(trainer={"peft_config": lora(**SAVED)})),
    "dpo": (dpo, Case(arguments=EVALUATING)),
    "dpo, peft": (dpo, Case(reference=False, trainer={"peft_config": lora(**EVERYWHERE)})),
    "dpo, reference computed first": (dpo, Case(reference=False, arguments={"precompute_ref_log_probs": True})),
    "dpo, ipo, no checkpoints": (dpo, Case(arguments={"loss_type": "ipo", "gradient_checkpointing": False})),
}
# the collator tells other layers where rows begin; attention takes no word that it does not know
BOTH_ORDERS = ("sft", "sft, peft", "dpo")
ORDERS = [(name, by) for name in CASES for by in ("apply", "callback") if by == "apply" or name in BOTH_ORDERS]


@cache
def vanilla(name: str) -> Trained:
    """Vanilla's training, once for both orders."""
    make, case = CASES[name]
    with TemporaryDirectory() as folder:
        return train(make, trl_runs.model(), case, Path(folder))


def ours(make: Any, case: Case, by: str, folder: Path) -> Trained:
    """The same by ours: applied before the trainer, or by the callback that it was given."""
    if by == "callback":
        return train(make, trl_runs.model(), case, folder, [AccelCallback()])
    return train(make, accel.apply(trl_runs.model()), case, folder)


def assert_ours_ran(trained: Trained) -> None:
    """Every fusion but the loss, which is the trainer's; and no logits."""
    report = accel.report(trained.trainer.model)
    counts = report.counts
    assert report.materialised_logits == counts.fused["loss"] == 0
    assert not counts.passed_on
    assert {fusion for fusion in ("norm", "residual", "mlp", "rope", "attention") if not counts.fused[fusion]} == set()
    assert counts.fused["mlp"] >= 2 * len(trained.run.losses)
    assert counts.fused["rope"] >= 2 * len(trained.run.losses)


@pytest.mark.parametrize(("name", "by"), ORDERS)
def test_exact(name: str, by: str, tmp_path: Path) -> None:
    make, case = CASES[name]
    expected = vanilla(name)
    done = ours(make, case, by, tmp_path)
    assert len(done.run.losses) >= MICRO_BATCHES - 2
    assert_close(Step(done.run.losses[0], done.gradients), Step(expected.run.losses[0], expected.gradients))
    runs.assert_same(done.run, expected.run)
    assert_ours_ran(done)


def test_evaluation(tmp_path: Path) -> None:
    """huggingface/trl#5069, #4730: metrics of logits, and the memory of an evaluation that wants none."""
    _, case = CASES["sft"]
    logged = [row for row in vanilla("sft").trainer.state.log_history if "eval_loss" in row]
    assert {"eval_mean_token_accuracy", "eval_entropy"} <= logged[-1].keys()
    found = []
    applied = accel.apply(trl_runs.model())
    for model in (applied, trl_runs.model()):
        trainer = sft(model, case, tmp_path)
        trainer.compute_metrics = accuracy
        metrics = trainer.evaluate()
        predicted = trainer.predict(trainer.eval_dataset)
        found.append([metrics["eval_square"], metrics["eval_rows"], metrics["eval_loss"], predicted.predictions])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert accel.report(applied).materialised_logits == 0


def test_as_exact_as_vanilla_in_bfloat16(tmp_path: Path) -> None:
    """With TRL's default precision, and autocast's."""
    case = Case(arguments={"bf16": True})
    theirs = train(sft, trl_runs.model(), case, tmp_path)
    done = ours(sft, case, "callback", tmp_path)
    runs.assert_as_good(done.run, theirs.run, vanilla("sft").run)
    assert_ours_ran(done)


def test_figures_are_in_the_log_of_the_trainer(tmp_path: Path) -> None:
    """Beside TRL's own."""
    trained = ours(sft, Case(arguments={"max_steps": 2}), "callback", tmp_path)
    row = next(row for row in trained.trainer.state.log_history if "loss" in row)
    assert {"mean_token_accuracy", "tokens_per_second_per_device", "materialised_logits"} <= row.keys()
    assert row["materialised_logits"] == 0


def test_liger_is_refused(tmp_path: Path) -> None:
    case = Case(arguments={"use_liger_kernel": True})
    with pytest.raises(ValueError, match="use_liger_kernel=True and AccelCallback would both change this model"):
        sft(trl_runs.model(), case, tmp_path, [AccelCallback()])


def test_a_callback_that_comes_too_late_is_refused(tmp_path: Path) -> None:
    """By then TRL has replaced the model's forward."""
    trainer: SFTTrainer = sft(trl_runs.model(), Case(), tmp_path)
    trainer.add_callback(AccelCallback())
    with pytest.raises(ValueError, match=r"added after the Trainer was built.* pass it to the Trainer instead"):
        trainer.train()


def test_applied_after_the_trainer_was_built(tmp_path: Path) -> None:
    """The head is called by nobody, and refused with the reason; the rest is ours all the same."""

    def late(model: Any, case: Case, folder: Path, callbacks: Any) -> SFTTrainer:
        trainer = sft(model, case, folder, callbacks)
        accel.apply(trainer.model)
        return trainer

    done = train(late, trl_runs.model(), CASES["sft"][1], tmp_path)
    runs.assert_same(done.run, vanilla("sft").run)
    report = accel.report(done.trainer.model)
    assert report.materialised_logits == 0
    assert report.counts.fused["mlp"] >= 2 * MICRO_BATCHES
    assert any("forward" in refusal.reason for fusion, refusal in report.refusals if fusion == "loss")


def test_an_adapter_on_the_head_is_refused_by_trl(tmp_path: Path) -> None:
    """huggingface/trl#4612: its loss reads the weight of the head. transformers' Trainer trains such a head with ours."""
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        sft(
            trl_runs.model(),
            Case(trainer={"peft_config": lora(target_modules=["lm_head"])}),
            tmp_path,
            [AccelCallback()],
        )


def test_reverted_after_training(tmp_path: Path) -> None:
    """The weights stay, and the trainer's forward runs without ours."""
    done = ours(sft, Case(arguments={"max_steps": 2}), "apply", tmp_path)
    model = done.trainer.model
    before = dict(accel.report(model).counts.fused)
    counts = accel.report(model).counts
    accel.revert(model)
    plain = trl_runs.model()
    plain.load_state_dict(model.state_dict())
    inputs = runs.padded(runs.rows(2))
    torch.testing.assert_close(model.eval()(**inputs).logits, plain.eval()(**inputs).logits, rtol=0, atol=0)
    assert dict(counts.fused) == before
    assert [type(module) for module in model.modules()] == [type(module) for module in copy.deepcopy(plain).modules()]


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: what it costs is TRL's import."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM: 19 places swapped and proved" in printed
    logged = re.findall(r"step (\d+): loss ([\d.]+), token accuracy [\d.]+, \d+ tokens/s, 0 steps with logits", printed)
    assert [int(step) for step, _ in logged] == [10, 20]
    assert float(logged[1][1]) < float(logged[0][1])
