"""Run: all that the training loop works with, built and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from automodel_accel.parallel.mesh import Ranks
from automodel_accel.report import Report
from automodel_accel.train.average import ParameterAverage
from automodel_accel.train.logs import Logging
from automodel_accel.train.settings import Checkpointing, Training


@dataclass(slots=True, kw_only=True)
class Run:
    """One run, on one of its processes.

    Attributes:
        folder: Where it leaves what it makes.
        recipe: What it is, in JSON's types, for its checkpoints and trackers.
        model: As it trains, spread over `ranks`.
        report: What `apply` did to it; None where nothing was applied.
        ranks: How the processes are laid out.
        device: Where batches go.
        training, checkpointing, logging: As the recipe says.
        optimizer: Over what trains.
        schedule: Of its rates.
        average: The moving average, if there is one.
        steps: Optimizer steps in all.
        accumulate: Micro-batches of a rank in a step.
        data: Batches of this rank, with `state_dict`, `load_state_dict` and `epoch`.
        validation: Batches to validate on, by names.
        teacher: That of a distillation, whose `loss` is taken then.
        saves_frozen: Whether checkpoints hold the parameters that do not train; they need not where these come from a file.
        divides_itself: Whether the model takes `num_items_in_batch`; else its mean is weighted.
        tokenizer: Tokenizer or processor, written beside the exported model; None where there is none.
    """

    folder: Path
    recipe: Mapping[str, Any]
    model: nn.Module
    report: Report | None
    ranks: Ranks
    device: torch.device
    training: Training
    checkpointing: Checkpointing
    logging: Logging
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    average: ParameterAverage | None
    steps: int
    accumulate: int
    data: Any
    validation: Mapping[str, Any] = field(default_factory=dict)
    teacher: Any = None
    saves_frozen: bool = True
    divides_itself: bool = True
    tokenizer: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.ranks.device_mesh is None or torch.distributed.get_rank() == 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return 1 if self.ranks.device_mesh is None else torch.distributed.get_world_size()

    @property
    def compute_dtype(self) -> str:
        """In which the matrix products run."""
        if self.training.autocast or self.ranks.mesh.param_dtype:
            return str(self.training.autocast or self.ranks.mesh.param_dtype)
        dtypes = (parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        return str(next(dtypes, torch.float32)).removeprefix("torch.")

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """What a checkpoint takes."""
        return [self.optimizer] if self.average is None else [self.optimizer, self.average]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, as keywords of `Checkpoints.save` and `load`."""
        return {"model": self.model, "optimizer": self.optimizers, "scheduler": self.schedule, "data": self.data}
