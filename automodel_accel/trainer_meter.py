"""What the steps of transformers' Trainer take."""

import functools
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from automodel_accel.kernels.facts import Facts
from automodel_accel.meter import Meter
from automodel_accel.report import Report


class TrainerMeter(Meter):
    """Measures one call of `train`, of a Trainer or of another loop that calls callbacks.

    Attributes:
        sees_batches: Whether steps begin with their batches; if not, tokens and the time of loading data are not known.
    """

    def __init__(self, args: TrainingArguments, model: nn.Module, trainer: Any, report: Report, facts: Facts) -> None:
        # one process drives them all (DataParallel), or they share its batches
        devices = max(1, args.n_gpu) * (trainer.get_tp_size() * trainer.get_cp_size() if trainer else 1)
        dtype = _dtype(args, model, trainer)
        super().__init__(model, report, facts, on_cuda=args.device.type == "cuda", devices=devices, dtype=dtype)
        self.sees_batches = False
        self._trainer = trainer
        self._watching: tuple[Any, Any] | None = None

    def watch_batches(self) -> None:
        """Count what `get_batch_samples` returns, called once per optimizer step, and take its time."""
        if self._trainer is None:
            return
        before, original = vars(self._trainer).get("get_batch_samples"), self._trainer.get_batch_samples

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.sees_batches = True
            self.begin()
            result = original(*args, **kwargs)
            self.receive(result[0])
            return result

        self._trainer.get_batch_samples = watched
        self._watching = watched, before

    def unwatch(self) -> None:
        """Give `get_batch_samples` back."""
        if self._watching is None:
            return
        watched, before = self._watching
        if vars(self._trainer).get("get_batch_samples") is watched:
            del self._trainer.get_batch_samples
            if before is not None:
                self._trainer.get_batch_samples = before

    def figures(self) -> dict[str, float | int]:
        """Of the steps since the last call; the time of loading data only where batches are seen."""
        found = super().figures()
        if not self.sees_batches:
            found.pop("seconds_data", None)
        return found


def _dtype(args: TrainingArguments, model: nn.Module, trainer: Any) -> str:
    """In which the matrix products run."""
    mixed = trainer.accelerator.mixed_precision if trainer is not None else None
    if args.bf16 or mixed == "bf16":
        return "bfloat16"
    if args.fp16 or mixed == "fp16":
        return "float16"
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return str(next(dtypes, torch.float32)).removeprefix("torch.")
