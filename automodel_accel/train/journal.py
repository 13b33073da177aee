"""The journal of a run: what its steps took and gave, said on the console and kept in the run's folder.

A row is written a step late, when the device has its figures: the host waits for nothing else. The first rank writes.
"""

import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from automodel_accel.kernels.facts import this_machine
from automodel_accel.meter import Meter
from automodel_accel.parallel.tokens import Figures, Step, StepSums
from automodel_accel.train.logs import Logs, training_line, validation_line
from automodel_accel.train.run import Run

GIB = 2**30
TIMES = ("seconds_data", "seconds_forward_backward", "seconds_optimizer")


@dataclass(slots=True)
class _Pending:
    """A step whose figures the device still makes."""

    step: int
    epoch: int
    lr: float
    grad_norm: torch.Tensor | None


@dataclass(slots=True)
class Totals:
    """Of a run, over all its ranks and from its first step on; a checkpoint keeps them.

    Attributes:
        seconds: In steps: waiting for batches, forward, backward, optimizer; no validation, no saving.
        tokens: Without padding.
        label_tokens: Those that carry loss.
        peak_memory_gb: The most that the first rank held, in 1e9 bytes.
    """

    seconds: float = 0.0
    tokens: int = 0
    label_tokens: int = 0
    peak_memory_gb: float = 0.0

    def as_dict(self) -> dict[str, float | int]:
        """For a checkpoint."""
        return asdict(self)


class Journal(contextlib.AbstractContextManager["Journal"]):
    """Written by the loop, in this order: `begin`, `receive`, `update`, `end`.

    Args:
        run: Whose it is.
        step: At which the run begins, or goes on.
        totals: Of the steps before.
    """

    def __init__(self, run: Run, step: int, totals: Totals | None = None) -> None:
        self._run, self._step = run, step
        self.totals = totals or Totals()
        self._logs = Logs(run.folder, run.logging, run.recipe, step) if run.is_first else None
        self._meter = _meter(run)
        self._bar = tqdm(total=run.steps, initial=step, unit="step", disable=None if run.is_first else True)
        self._pending: _Pending | None = None
        self._tokens_seen = run.data.filled.tokens
        self._unread = 0
        self._sums = torch.zeros(2, dtype=torch.float64, device=run.device)  # tokens and label tokens, not yet read
        self._bad = torch.zeros((), dtype=torch.int64, device=run.device)
        self._recent: deque[tuple[int, Sequence[Mapping[str, Any]]]] = deque(
            maxlen=run.logging.every + run.training.bad_steps
        )
        self.loss: float | None = None

    def __exit__(self, *error: object) -> None:
        """End the bar, and write what waits."""
        self._bar.close()
        if self._logs is not None:
            self._logs.close()

    def begin(self) -> None:
        """A step begins: its batches are asked for."""
        self._meter.begin()

    def receive(self, micro_batches: Sequence[Mapping[str, Any]], step: Step) -> None:
        """The batches of a step are there; the figures of the step before may be."""
        self._meter.receive(list(micro_batches))
        self._recent.append((self._step + 1, micro_batches))
        self._hear(step.before)

    def update(self, sums: StepSums, grad_norm: torch.Tensor | None) -> None:
        """Forward and backward are queued."""
        self._meter.update()
        tokens = self._run.data.filled.tokens
        sums.note(noted_tokens=tokens - self._tokens_seen)
        self._tokens_seen = tokens
        lr = self._run.optimizer.param_groups[0]["lr"]
        self._pending = _Pending(self._step + 1, self._run.data.epoch, lr, grad_norm)

    def end(self) -> None:
        """The step is queued."""
        self._meter.end()
        self._step += 1
        self._unread += 1
        self._bar.update()

    def flush(self, sums: StepSums) -> None:
        """Write the row of the last step now; waits for the device."""
        if self._pending is not None:
            self._hear(sums.end(), must_write=True)

    def validated(self, name: str, loss: float, label_tokens: int) -> None:
        """Write the row of a validation."""
        run = self._run
        lr = run.optimizer.param_groups[0]["lr"]
        row = {"name": name, "step": self._step, "epoch": run.data.epoch, "val_loss": loss, "lr": lr}
        if self._logs is not None:
            self._logs.validation({**row, "num_label_tokens": label_tokens})
            self._bar.write(validation_line({**row, "num_label_tokens": label_tokens}))

    def _hear(self, figures: Figures | None, must_write: bool = False) -> None:
        pending, self._pending = self._pending, None
        if pending is None or figures is None:
            return
        values = dict(zip(figures.names, figures.values, strict=True))
        self._bad = torch.where(torch.isfinite(values["loss"]), 0, self._bad + 1)
        self._sums += torch.stack([values["tokens"], values["noted_tokens"]])
        if must_write or pending.step % self._run.logging.every == 0:
            self._write(pending, values)

    def _write(self, pending: _Pending, values: Mapping[str, torch.Tensor]) -> None:
        """The one place that waits for the device."""
        run = self._run
        told = [values["loss"], values["tokens"], *self._sums, self._bad]
        norm = pending.grad_norm
        told.append(torch.zeros(()) if norm is None else norm)
        loss, labels, all_labels, tokens, bad, grad_norm = torch.stack(
            [one.to(run.device, torch.float64) for one in told]
        ).tolist()
        measured = self._meter.figures()
        seconds = sum(measured[name] for name in TIMES) * self._unread
        self._unread = 0
        self._sums = torch.zeros_like(self._sums)
        self.totals.seconds += seconds
        self.totals.tokens += int(tokens)
        self.totals.label_tokens += int(all_labels)
        self.totals.peak_memory_gb = max(self.totals.peak_memory_gb, measured["peak_memory_gb"])
        self.loss = loss
        rate = tokens / seconds if seconds else 0.0
        row = {
            "step": pending.step,
            "epoch": pending.epoch,
            "loss": loss,
            "grad_norm": grad_norm if norm is not None else float("nan"),
            "lr": pending.lr,
            "mem": measured["peak_memory_gb"] * 1e9 / GIB,
            "tps": rate,
            "tps_per_gpu": rate / run.world_size,
            "num_label_tokens": int(labels),
            "mfu": measured.get("mfu"),
            **{name: measured[name] for name in (*TIMES, "materialised_logits") if name in measured},
        }
        if self._logs is not None:
            self._logs.training(row)
            self._bar.write(training_line(row))
        if bad >= run.training.bad_steps:
            self._give_up(pending.step, int(bad))

    def _give_up(self, step: int, bad: int) -> None:
        first = step - bad + 1
        batches = next((batches for number, batches in self._recent if number == first), ())
        rank = 0 if self._run.ranks.device_mesh is None else torch.distributed.get_rank()
        path = self._run.folder / f"bad_batch_step_{first}_rank_{rank}.safetensors"
        tensors = {
            f"{number}.{name}": value.detach().cpu().contiguous()
            for number, batch in enumerate(batches)
            for name, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, path)
        raise FloatingPointError(
            f"the losses of {bad} steps in a row were not finite, the first of step {first}, whose batches are in {path}. Lower "
            "optimizer.lr, clip (training.max_grad_norm), or look at the data; the last checkpoint before it is whole."
        )


def _meter(run: Run) -> Meter:
    mesh = run.ranks.mesh
    return Meter(
        run.model,
        run.report,
        this_machine(),
        on_cuda=run.device.type == "cuda",
        devices=mesh.context * mesh.tensor,
        dtype=run.compute_dtype,
    )
