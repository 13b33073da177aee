"""What AccelCallback writes into the Trainer's log, against hand counts on a made-up clock."""

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import DataCollatorWithFlattening, TrainerCallback

import automodel_accel as accel
from automodel_accel.callback import AccelCallback
from automodel_accel.kernels.facts import this_machine
from automodel_accel.meter import LINUX_STATUS, Meter
from tests.loops.callback_runs import (
    DATA,
    UPDATE,
    WORK,
    Clock,
    Rows,
    TakesTime,
    TimedSgd,
    ragged,
    timed_trainer,
    trainer_of,
    training_logs,
)
from tests.tiny import VOCABULARY, batch, tiny

NAMES = {
    "tokens_per_second_per_device",
    "label_tokens_per_second_per_device",
    "peak_memory_gb",
    "materialised_logits",
    "seconds_data",
    "seconds_forward_backward",
    "seconds_optimizer",
}
H100 = replace(this_machine(), device_name="NVIDIA H100 80GB HBM3")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made_up = Clock()
    monkeypatch.setattr("automodel_accel.meter.time", made_up)
    return made_up


def _timed(folder: Path, clock: Clock, callback: AccelCallback, given: dict[str, Any], **arguments: Any) -> Any:
    model = tiny()
    given = {"optimizers": (TimedSgd(model, clock), None), **given}
    return trainer_of(
        folder, callback, TakesTime(clock), model=model, kind=timed_trainer(clock), given=given, **arguments
    )


def test_tokens_and_times_are_those_of_a_hand_count(tmp_path: Path, clock: Clock) -> None:
    """Padding is no token; evaluating, saving and logging take no time of a step; two micro-batches are one step."""
    rows = ragged()
    trainer = _timed(
        tmp_path,
        clock,
        AccelCallback(),
        {"eval_dataset": rows[:2]},
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=3,
    )
    trainer.train()
    logs = training_logs(trainer)
    assert len(logs) == 2
    step = DATA + 2 * WORK + UPDATE
    for number, log in enumerate(logs):
        seen = rows[8 * number : 8 * number + 8]
        tokens = sum(len(row["input_ids"]) for row in seen)
        labels = sum(int((row["labels"] != -100).sum()) for row in seen)
        assert 0 < labels < tokens
        assert log["tokens_per_second_per_device"] == tokens / (2 * step)
        assert log["label_tokens_per_second_per_device"] == labels / (2 * step)
        assert (log["seconds_data"], log["seconds_forward_backward"], log["seconds_optimizer"]) == (
            DATA,
            2 * WORK,
            UPDATE,
        )
        assert log.keys() >= NAMES
        assert {type(log[name]) for name in NAMES} == {int, float}
    for log in trainer.state.log_history:
        assert "loss" in log or not NAMES & log.keys(), "only the logs of training"


def test_packed_rows_count_all_their_tokens(tmp_path: Path, clock: Clock) -> None:
    rows = [{name: column.tolist() for name, column in row.items()} for row in ragged()]
    given = {"train_dataset": Rows(rows), "data_collator": DataCollatorWithFlattening()}
    trainer = _timed(tmp_path, clock, AccelCallback(), given, max_steps=2)
    trainer.train()
    for number, log in enumerate(training_logs(trainer)):
        tokens = sum(len(row["input_ids"]) for row in rows[2 * number : 2 * number + 2])
        assert log["tokens_per_second_per_device"] == tokens / (DATA + WORK + UPDATE)


@pytest.mark.parametrize("packed", [False, True])
def test_mfu_is_the_models_flops_by_time_and_data_sheet(tmp_path: Path, clock: Clock, packed: bool) -> None:
    rows = ragged()
    given: dict[str, Any] = {}
    if packed:
        lists = [{name: column.tolist() for name, column in row.items()} for row in rows]
        given = {"train_dataset": Rows(lists), "data_collator": DataCollatorWithFlattening()}
    trainer = _timed(tmp_path, clock, AccelCallback(facts=H100), given, max_steps=1, bf16=True)
    trainer.train()
    lengths = [len(row["input_ids"]) for row in rows[:2]]
    hidden, inner, heads, kv_heads, size, layers = 32, 48, 4, 2, 8, 2
    weights = layers * (hidden * size * (2 * heads + 2 * kv_heads) + 3 * hidden * inner) + hidden * VOCABULARY
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    flops = 6 * sum(lengths) * weights + 12 * layers * heads * size * pairs
    (log,) = training_logs(trainer)
    assert log["mfu"] == pytest.approx(flops / (DATA + WORK + UPDATE) / 989.4e12, rel=1e-12)


@pytest.mark.parametrize(("facts", "bf16"), [(H100, False), (this_machine(), True)], ids=["float32", "unlisted"])
def test_no_mfu_without_a_known_peak(tmp_path: Path, facts: Any, bf16: bool) -> None:
    trainer = trainer_of(tmp_path, AccelCallback(facts=facts), max_steps=1, bf16=bf16)
    trainer.train()
    assert training_logs(trainer)[0].keys() >= NAMES
    assert "mfu" not in training_logs(trainer)[0]


class ReadsLogits(TrainerCallback):
    """Makes the next training step build its logits, once."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            kwargs["model"](**batch()).logits.softmax(-1)


def test_materialised_logits_are_those_since_the_last_log(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, AccelCallback(), ReadsLogits(), max_steps=3)
    for times in (1, 2):
        trainer.train()
        assert [log["materialised_logits"] for log in training_logs(trainer)] == [1, 0, 0]
        assert accel.report(trainer.model).materialised_logits == times


def test_no_count_of_logits_where_the_loss_is_the_models_own(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, AccelCallback(loss=False), max_steps=1)
    trainer.train()
    assert "materialised_logits" not in training_logs(trainer)[0], "0 would be a lie"


@pytest.mark.skipif(not LINUX_STATUS.exists(), reason="reads Linux's account of the process")
def test_memory_is_the_most_that_the_process_held(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, AccelCallback(), max_steps=1)
    block = torch.ones(100, 2**20)  # 0.4 GB, not held while training
    held = _memory_gb("VmHWM")  # of this test, or of a larger one before it in the same process
    del block
    trainer.train()
    assert _memory_gb("VmRSS") < held - 0.3
    assert held - 0.01 < training_logs(trainer)[0]["peak_memory_gb"] < held + 0.3


def _memory_gb(name: str) -> float:
    lines = LINUX_STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(name))


def test_tensorboard_shows_the_figures_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trainer_of(tmp_path, AccelCallback(), report_to="tensorboard", max_steps=4, logging_steps=2)
    trainer.train()
    (folder,) = {file.parent for file in (tmp_path / "events").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in NAMES | {"loss"}:
        shown = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        kept = {log["step"]: log[name] for log in training_logs(trainer)}
        assert shown == pytest.approx(kept, rel=1e-6), name
        assert sorted(shown) == [2, 4]


def test_logging_less_often_keeps_no_steps_waiting(tmp_path: Path) -> None:
    callback = AccelCallback()
    waiting = []

    class Looks(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            assert callback._meter is not None
            waiting.append(len(callback._meter._open))

    trainer_of(tmp_path, callback, Looks(), logging_strategy="no").train()
    assert waiting == [0, 0, 0]


def test_own_time_is_below_two_percent_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock around everything of the callback that runs in a step; medians, since other processes run too."""
    own = [0.0]

    def timed(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(*args, **kwargs)
            own[-1] += time.perf_counter() - start
            return result

        monkeypatch.setattr(kind, name, method)

    for event in ("on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_log"):
        timed(AccelCallback, event)
    timed(Meter, "begin")
    timed(Meter, "receive")
    laps = [time.perf_counter()]

    class Laps(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            laps.append(time.perf_counter())
            own.append(0.0)

    trainer_of(tmp_path, AccelCallback(facts=H100), Laps(), max_steps=60, logging_steps=5, bf16=True).train()
    shares = [spent / (end - start) for spent, start, end in zip(own[1:], laps[1:], laps[2:])]
    assert len(shares) >= 10
    assert 0 < statistics.median(shares) < 0.02, f"{statistics.median(shares):.2%} of a step"


@pytest.mark.gpu
def test_times_on_a_gpu_add_up_to_the_time_that_passed(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, AccelCallback(), max_steps=20, logging_steps=20, use_cpu=False)
    start = time.perf_counter()
    trainer.train()
    passed = time.perf_counter() - start
    (log,) = training_logs(trainer)
    parts = [log[name] for name in ("seconds_data", "seconds_forward_backward", "seconds_optimizer")]
    assert all(part >= 0 for part in parts)
    assert 0 < 20 * sum(parts) <= passed
    assert 0 < log["peak_memory_gb"] == torch.cuda.max_memory_allocated() / 1e9
