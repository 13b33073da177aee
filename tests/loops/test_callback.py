"""AccelCallback in a Trainer: when it applies, what it refuses, and what it leaves behind."""

import copy
import gc
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler

import automodel_accel as accel
from automodel_accel.callback import AccelCallback
from tests.loops.callback_runs import (
    DATA,
    UPDATE,
    WORK,
    Clock,
    TimedSgd,
    losses,
    ragged,
    timed_trainer,
    trainer_of,
    training_logs,
)
from tests.tiny import tiny

SPEED = "tokens_per_second_per_device"


def _is_applied(model: Any) -> bool:
    return accel.report(model).places("loss") == 1


def test_training_is_that_of_apply(tmp_path: Path) -> None:
    """The same bits; the callback adds to the log and changes nothing else."""
    runs = []
    for callbacks in ([AccelCallback()], []):
        model = tiny()
        if not callbacks:
            accel.apply(model)
        trainer = trainer_of(tmp_path, *callbacks, model=model, gradient_accumulation_steps=2)
        trainer.train()
        runs.append((losses(trainer), model.state_dict()))
    (with_callback, weights), (with_apply, expected) = runs
    assert with_callback == with_apply
    assert len(set(with_callback)) == 3
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_applies_when_the_trainer_is_built_and_reports_first(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, AccelCallback(loss="torch"))
    assert _is_applied(trainer.model)
    assert trainer.optimizer is None
    assert type(trainer.callback_handler.callbacks[0]) is AccelCallback
    vanilla = trainer_of(tmp_path)
    others = [type(callback) for callback in trainer.callback_handler.callbacks[1:]]
    assert others == [type(callback) for callback in vanilla.callback_handler.callbacks], (
        "nobody is called twice or lost"
    )


def test_the_class_itself_may_be_given(tmp_path: Path) -> None:
    assert _is_applied(trainer_of(tmp_path, AccelCallback).model)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"norm": "torch"}], ids=["no settings", "the same settings"])
def test_a_model_that_is_applied_stays_so_without_a_word(
    tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = accel.apply(tiny(), norm="torch")
    trainer = trainer_of(tmp_path, AccelCallback(**settings), model=model)
    trainer.train()
    assert accel.report(trainer.model).plan.config.norm == "torch"
    assert len(training_logs(trainer)) == 3
    assert not [record for record in caplog.records if record.name == "automodel_accel"]


def test_other_settings_than_the_models_are_refused(tmp_path: Path) -> None:
    model = accel.apply(tiny(), norm="torch")
    with pytest.raises(ValueError, match=r"already applied with .* call revert\(model\) before applying"):
        trainer_of(tmp_path, AccelCallback(norm=False), model=model)


def test_an_unknown_setting_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="norm"):
        AccelCallback(nrom="torch")


def test_liger_beside_it_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"Leave use_liger_kernel out .* or leave AccelCallback out"):
        trainer_of(tmp_path, AccelCallback(), model=model, use_liger_kernel=True)
    with pytest.raises(ValueError, match="not applied"):
        accel.report(model)


def test_two_of_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two AccelCallbacks"):
        trainer_of(tmp_path, AccelCallback(), AccelCallback())


def test_added_after_the_trainer_was_built_it_applies_when_training_begins(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.add_callback(AccelCallback())
    trainer.train()
    assert _is_applied(trainer.model)
    assert type(trainer.callback_handler.callbacks[0]) is AccelCallback
    assert all(SPEED in log for log in training_logs(trainer))
    expected = trainer_of(tmp_path, AccelCallback())
    expected.train()
    assert losses(trainer) == losses(expected)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"bf16": True}, "the forward of the model is replaced already"),
        ({"torch_compile": True}, "the model is in a OptimizedModule already"),
    ],
    ids=["mixed precision", "torch.compile"],
)
def test_added_too_late_it_names_the_line_to_move(tmp_path: Path, arguments: dict[str, Any], reason: str) -> None:
    trainer = trainer_of(tmp_path, **arguments)
    trainer.add_callback(AccelCallback())
    with pytest.raises(ValueError, match=reason) as error:
        trainer.train()
    assert str(error.value).endswith("Trainer(..., callbacks=[AccelCallback()]).")
    with pytest.raises(ValueError, match="not applied"):
        accel.report(trainer.model)


def test_added_too_late_beside_liger_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda *args: None)  # it changes classes for good
    trainer = trainer_of(tmp_path, use_liger_kernel=True)
    trainer.add_callback(AccelCallback())
    with pytest.raises(ValueError, match="use_liger_kernel"):
        trainer.train()


def test_every_model_of_model_init_is_applied_before_it_is_wrapped(tmp_path: Path) -> None:
    """bfloat16 autocast replaces the forward before training begins: only a model applied before that has lazy logits."""
    made = []

    def model_init() -> Any:
        made.append(tiny())
        return made[-1]

    trainer = trainer_of(tmp_path, AccelCallback(), given={"model_init": model_init}, bf16=True)
    for times in (1, 2):
        trainer.train()
        assert trainer.model is made[times]
        assert all(_is_applied(model) for model in made)
        assert all(log["materialised_logits"] == 0 for log in training_logs(trainer))
        assert accel.report(trainer.model).counts.fused["loss"] == 3


def test_training_twice_counts_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("automodel_accel.meter.time", clock)
    trainer = trainer_of(tmp_path, AccelCallback(), kind=timed_trainer(clock))
    found = []
    for _ in range(2):
        trainer.train()
        assert "get_batch_samples" not in vars(trainer)
        found.append([log[SPEED] for log in training_logs(trainer)])
    tokens = sum(len(row["input_ids"]) for row in ragged()[:2])
    assert found[0] == found[1]
    assert found[0][0] == tokens / (DATA + WORK)


class Crashes(TrainerCallback):
    """In the middle of the second step, once."""

    crashed = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and not self.crashed:
            self.crashed = True
            raise RuntimeError("out of memory")


def test_training_after_a_crash_counts_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("automodel_accel.meter.time", clock)
    model = tiny()
    given = {"optimizers": (TimedSgd(model, clock), None)}
    trainer = trainer_of(tmp_path, AccelCallback(), Crashes(), model=model, kind=timed_trainer(clock), given=given)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    batches, _ = trainer.get_batch_samples(iter([{"input_ids": torch.ones(1, 2)}]), 1, torch.device("cpu"))
    assert len(batches) == 1, "outside of training it works as before"
    trainer.train()
    assert "get_batch_samples" not in vars(trainer)
    expected = [sum(len(row["input_ids"]) for row in ragged()[at : at + 2]) for at in (0, 2, 4)]
    assert [log[SPEED] * (DATA + WORK + UPDATE) for log in training_logs(trainer)] == pytest.approx(expected)


def test_a_get_batch_samples_of_the_users_is_given_back(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, AccelCallback())
    calls = []
    original = trainer.get_batch_samples

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    trainer.get_batch_samples = mine  # type: ignore[method-assign]
    trainer.train()
    assert trainer.get_batch_samples is mine
    assert len(calls) == 3


def test_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    """Stateful callbacks are taken out and put back on the way; the losses are those of a run that was not interrupted."""

    def run(**arguments: Any) -> Trainer:
        return trainer_of(
            tmp_path,
            EarlyStoppingCallback(3),
            AccelCallback(),
            given={"eval_dataset": ragged()[:2]},
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            restore_callback_states_from_checkpoint=True,
            metric_for_best_model="eval_loss",
            load_best_model_at_end=True,
            **arguments,
        )

    whole = run()
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert type(resumed.callback_handler.callbacks[0]) is AccelCallback
    assert losses(resumed) == losses(whole)
    assert len(losses(resumed)) == 4
    assert all(log[SPEED] > 0 for log in training_logs(resumed))


def test_evaluate_and_predict_without_training(tmp_path: Path) -> None:
    rows = ragged()[:4]
    accelerated = trainer_of(tmp_path, AccelCallback(), given={"eval_dataset": rows})
    vanilla = trainer_of(tmp_path, given={"eval_dataset": rows})
    mine, theirs = accelerated.evaluate(), vanilla.evaluate()
    assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)
    assert mine.keys() == theirs.keys()
    predicted, expected = accelerated.predict(rows).predictions, vanilla.predict(rows).predictions
    assert predicted == pytest.approx(expected, abs=1e-5)


def test_pickles_and_copies_before_and_after_training(tmp_path: Path) -> None:
    callback = AccelCallback(norm="torch")
    for again in (lambda: pickle.loads(pickle.dumps(callback)), lambda: copy.deepcopy(callback)):
        trainer = trainer_of(tmp_path, again())
        assert accel.report(trainer.model).plan.config.norm == "torch"
        trainer_of(tmp_path, callback, max_steps=1).train()
        assert vars(again()).keys() == vars(callback).keys()


def test_nothing_is_kept_alive_after_training(tmp_path: Path) -> None:
    callback = AccelCallback()
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    left = [weakref.ref(trainer), weakref.ref(trainer.model), weakref.ref(trainer.optimizer)]
    del trainer
    gc.collect()
    assert [reference() for reference in left] == [None, None, None]
    assert isinstance(callback, AccelCallback)


def test_another_loop_that_calls_callbacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a Trainer it applies and times what it is told of, and says once what it cannot do."""
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    state, control, logs = TrainerState(), TrainerControl(), {"loss": 1.0}
    state.log_history = [{"loss": 0.5, "step": 7}]
    handler = CallbackHandler([AccelCallback()], model, None, optimizer, None)
    with caplog.at_level(logging.WARNING, "automodel_accel"):
        handler.on_train_begin(arguments, state, control)
        handler.on_step_begin(arguments, state, control)
        handler.on_pre_optimizer_step(arguments, state, control)
        handler.on_step_end(arguments, state, control)
        handler.on_log(arguments, state, control, logs)
        handler.on_train_end(arguments, state, control)
    assert _is_applied(model)
    assert logs.keys() == {
        "loss",
        "peak_memory_gb",
        "materialised_logits",
        "seconds_forward_backward",
        "seconds_optimizer",
    }
    assert state.log_history == [{"loss": 0.5, "step": 7}], "that is another log"
    said = [record.message for record in caplog.records if record.name == "automodel_accel"]
    assert len(said) == 1
    assert "no transformers Trainer calls this AccelCallback" in said[0]


class OwnLoop(Trainer):
    """A Trainer that does not ask `get_batch_samples` for its batches."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        handler, told = self.callback_handler, (self.args, self.state, self.control)
        handler.on_train_begin(*told)
        for _ in range(2):
            handler.on_step_begin(*told)
            self.state.global_step += 1
            handler.on_pre_optimizer_step(*told)
            handler.on_step_end(*told)
            self.log({"loss": 1.0})
        handler.on_train_end(*told)


def test_a_trainer_with_a_loop_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, AccelCallback(), kind=OwnLoop)
    trainer.train()
    for log in training_logs(trainer):
        assert log["seconds_forward_backward"] > 0
        assert SPEED not in log
        assert "seconds_data" not in log
    assert not [record for record in caplog.records if record.name == "automodel_accel"]
