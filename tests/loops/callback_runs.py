"""Trainers of tiny models for the tests of AccelCallback, and a clock that goes only when it is told to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.tiny import VOCABULARY, tiny

Row = dict[str, torch.Tensor]
DATA, WORK, UPDATE, ELSEWHERE = 3.0, 5.0, 2.0, 1000.0  # seconds on the made-up clock; WORK of a micro-batch


class Rows(IterableDataset):  # type: ignore[type-arg]
    """Always in this order."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def ragged(count: int = 160, longest: int = 24) -> list[Row]:
    """Rows of 5 to `longest` tokens; the first ones of each have no label."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        length = 5 + number * 7 % (longest - 4)
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = tokens.clone()
        labels[: number % 4] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


def padded(rows: list[Row]) -> Row:
    """A batch with zeros on the left, and a mask."""
    width = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": torch.zeros(len(rows), width).long(), "labels": torch.full((len(rows), width), -100)}
    batch["attention_mask"] = torch.zeros(len(rows), width).long()
    for at, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][at, -length:], batch["labels"][at, -length:] = row["input_ids"], row["labels"]
        batch["attention_mask"][at, -length:] = 1
    return batch


def trainer_of(
    folder: Path,
    *callbacks: TrainerCallback,
    model: nn.Module | None = None,
    kind: type[Trainer] = Trainer,
    given: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """A Trainer of a tiny Llama on the CPU, two rows a micro-batch, in the order of the data, a log every step."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    given = {"train_dataset": Rows(ragged()), "data_collator": padded, **(given or {})}
    if "model_init" not in given:
        given["model"] = tiny() if model is None else model
    return kind(args=TrainingArguments(str(folder), **settings), callbacks=list(callbacks), **given)


def training_logs(trainer: Trainer) -> list[dict[str, float]]:
    """The Trainer's logs of the training loss."""
    return [log for log in trainer.state.log_history if "loss" in log]


def losses(trainer: Trainer) -> list[float]:
    """Of every log."""
    return [log["loss"] for log in training_logs(trainer)]


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def timed_trainer(clock: Clock) -> type[Trainer]:
    """A Trainer whose parts take known times on `clock`: data and work; and what belongs to no step."""

    class Timed(Trainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            clock.now += DATA
            return super().get_batch_samples(*args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            clock.now += WORK
            return super().training_step(*args, **kwargs)

    return Timed


class TimedSgd(torch.optim.SGD):
    """Its step takes a known time."""

    def __init__(self, model: nn.Module, clock: Clock) -> None:
        super().__init__(model.parameters(), lr=0.01)
        self.clock = clock

    def step(self, closure: Any = None) -> None:
        self.clock.now += UPDATE
        super().step(closure)


class TakesTime(TrainerCallback):
    """Takes time where no step is."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def _wait(self, *args: Any, **kwargs: Any) -> None:
        self.clock.now += ELSEWHERE

    on_log = on_evaluate = on_save = on_epoch_begin = on_epoch_end = _wait
