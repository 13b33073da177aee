"""The training loop, top to bottom.

The host waits for the device in one place, where a row is written, a step late; everything else is queued.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from automodel_accel.checkpoint import Checkpoints, Restored
from automodel_accel.evaluation import held_out_loss
from automodel_accel.parallel import clip_grad_norm_
from automodel_accel.parallel.gradients import accumulate
from automodel_accel.parallel.tokens import StepSums, label_tokens
from automodel_accel.train.journal import Journal, Totals
from automodel_accel.train.run import Run

Batch = Mapping[str, Any]
KEPT = ("loss", "validation", "validation_at_start")  # of an outcome, in each checkpoint


@dataclass(slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: Optimizer steps, those before it went on included.
        is_complete: Whether these are all; else a signal stopped it, and it can go on.
        loss: Of the last step.
        validation: The last loss on each validation set.
        validation_at_start: The first one, before any step.
        totals: Time and tokens.
    """

    step: int
    is_complete: bool = False
    loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    validation_at_start: dict[str, float] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)

    def metrics(self) -> dict[str, float]:
        """What the best checkpoint is chosen by: `val_loss`, the mean over the validation sets, else `loss`."""
        found = {} if self.loss is None else {"loss": self.loss}
        if self.validation:
            found["val_loss"] = sum(self.validation.values()) / len(self.validation)
        return found


def train(run: Run) -> Outcome:
    """Train from the last checkpoint, or from the beginning, to the last step or to a signal.

    Raises:
        FloatingPointError: `training.bad_steps` losses in a row were not finite; the batch of the first is saved.
        ValueError: the checkpoint is of another run.
    """
    chosen, saving = run.training, run.checkpointing
    with _checkpoints(run) as checkpoints:
        restored = checkpoints.load(**run.state())
        outcome = _begun(restored)
        with Journal(run, outcome.step, outcome.totals) as journal:
            if restored is None and chosen.validate_at_start:
                validate(run, journal, outcome)
                outcome.validation_at_start = dict(outcome.validation)
            run.model.train()
            sums = StepSums(run.ranks, run.device)
            steps = _steps(run)
            while outcome.step < run.steps:
                journal.begin()
                micro_batches = next(steps, None)
                if micro_batches is None:  # the data ended
                    break
                step = sums.begin(micro_batches)
                journal.receive(micro_batches, step)
                for number, batch in enumerate(micro_batches, 1):
                    with accumulate(run.model, last=number == len(micro_batches)):
                        with _autocast(run):
                            loss = loss_of(run, batch, step.items)
                        loss.backward()  # type: ignore[no-untyped-call]
                    sums.add(loss)
                grad_norm = clip_grad_norm_(run.model, chosen.max_grad_norm) if chosen.max_grad_norm else None
                journal.update(sums, grad_norm)
                run.optimizer.step()
                run.schedule.step()
                run.optimizer.zero_grad()
                if run.average is not None:
                    run.average.step()
                journal.end()
                outcome.step += 1

                stop, last = checkpoints.stop_requested(), outcome.step == run.steps
                if chosen.validate_every and outcome.step % chosen.validate_every == 0 and not (stop or last):
                    journal.flush(sums)
                    validate(run, journal, outcome)
                if stop or (saving.every and outcome.step % saving.every == 0 and not last):
                    journal.flush(sums)
                    save(run, checkpoints, journal, outcome)
                if stop:
                    return outcome
            journal.flush(sums)
            outcome.is_complete = True
            if restored is None or restored.step < outcome.step:
                validate(run, journal, outcome)
                save(run, checkpoints, journal, outcome)
    return outcome


def validate(run: Run, journal: Journal, outcome: Outcome) -> None:
    """The loss on each validation set, of the averaged parameters where there are such."""
    with run.average.in_place() if run.average is not None else nullcontext():
        for name, batches in run.validation.items():
            with _autocast(run):
                found = held_out_loss(run.model, batches, ranks=run.ranks)
            outcome.validation[name] = found.loss
            journal.validated(name, found.loss, found.label_tokens)


def save(run: Run, checkpoints: Checkpoints, journal: Journal, outcome: Outcome) -> None:
    """Begin to write a checkpoint."""
    outcome.loss = journal.loss
    extra = {"totals": journal.totals.as_dict(), **{name: getattr(outcome, name) for name in KEPT}}
    checkpoints.save(outcome.step, metrics=outcome.metrics(), extra=extra, **run.state())


def loss_of(run: Run, batch: Batch, items: torch.Tensor) -> torch.Tensor:
    """This micro-batch's share of the loss of the step.

    Args:
        run: Whose model.
        batch: Its keyword arguments.
        items: The sum of its losses is divided by this; 0-dimensional.
    """
    if run.teacher is not None:
        return run.teacher.loss(run.model, batch, items)  # type: ignore[no-any-return]
    if run.divides_itself:
        return run.model(**batch, num_items_in_batch=items).loss  # type: ignore[no-any-return]
    return run.model(**batch).loss * (label_tokens(batch) / items)  # type: ignore[no-any-return]


def _checkpoints(run: Run) -> Checkpoints:
    saving = run.checkpointing
    return Checkpoints(
        run.folder / "checkpoints",
        keep_last=saving.keep_last,
        keep_best=saving.keep_best,
        metric="val_loss" if run.validation else "loss",
        frozen=run.saves_frozen,
        asynchronous=saving.asynchronous,
        signals=saving.signals,
        ranks=run.ranks,
        timeout_minutes=run.ranks.mesh.timeout_minutes,
    )


def _begun(restored: Restored | None) -> Outcome:
    if restored is None:
        return Outcome(0)
    kept = dict(restored.extra)
    return Outcome(restored.step, totals=Totals(**kept.pop("totals")), **kept)


def _steps(run: Run) -> Iterator[list[Batch]]:
    """The micro-batches of each step, on the device."""
    batches = iter(run.data)
    while taken := list(islice(batches, run.accumulate)):
        yield [
            {
                name: value.to(run.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
            for batch in taken
        ]


def _autocast(run: Run) -> AbstractContextManager[Any]:
    if run.training.autocast is None:
        return nullcontext()
    return torch.autocast(run.device.type, getattr(torch, run.training.autocast))
