"""Checkpoints: save a run while it goes on, and go on from the last checkpoint that is whole."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from automodel_accel.checkpoint import catalog, loading, saving, state
from automodel_accel.checkpoint.agreement import Agreement
from automodel_accel.checkpoint.catalog import Keep
from automodel_accel.checkpoint.plain import decode, encode
from automodel_accel.checkpoint.stopping import Stopping
from automodel_accel.checkpoint.tensors import Part, Staging, own_parts, views, writers
from automodel_accel.parallel.mesh import AXES, Ranks


@dataclass(frozen=True, slots=True)
class Restored:
    """What `Checkpoints.load` restored.

    Attributes:
        step: Of the run when it was saved.
        folder: Of the checkpoint.
        metrics: As given to `save`.
        extra: As given to `save`.
    """

    step: int
    folder: Path
    metrics: Mapping[str, float]
    extra: Any


class Checkpoints:
    """The checkpoints of one run in one folder, which all of its processes see. Made at the same place in each of them.

    Args:
        folder: Made where there is none.
        keep_last: How many of the last checkpoints stay; None for all.
        keep_best: How many of the best by `metric` stay beside these.
        metric: A name in the metrics of `save`.
        greater_is_better: Whether that metric is the better the greater it is.
        frozen: Whether parameters that do not train are saved too. Without them a checkpoint of adapters is small, and is loaded into
            a model whose other parameters have their values already.
        asynchronous: Whether a thread writes, from copies, while training goes on.
        signals: Names of signals that `stop_requested` tells of, such as "SIGTERM", and "SIGUSR1" where SLURM is asked to send it.
        ranks: How the processes are laid out; without, each is taken to read rows of its own.
        timeout_minutes: After how long a rank that does not answer is an error.

    Raises:
        ValueError: a number that makes no sense, or a signal that there is not.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int | None = 3,
        keep_best: int = 0,
        metric: str = "loss",
        greater_is_better: bool = False,
        frozen: bool = True,
        asynchronous: bool = True,
        signals: Sequence[str] = ("SIGTERM",),
        ranks: Ranks | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        if (keep_last is not None and keep_last < 1) or keep_best < 0:
            raise ValueError(
                f"Checkpoints: keep_last is {keep_last}, expected at least 1 or None for all; keep_best is {keep_best}, expected at "
                "least 0."
            )
        self.folder = Path(folder).absolute()
        self._keep = Keep(keep_last, keep_best, metric, greater_is_better)
        self._ranks, self._frozen = ranks, frozen
        self._together: Agreement[Any] = Agreement(timeout_minutes)
        self._writing: Agreement[Any] = Agreement(timeout_minutes)  # used by the thread, so a group of its own
        self._stopping = Stopping(signals, self._together.group)
        self._thread = ThreadPoolExecutor(1, "checkpoints") if asynchronous else None
        self._staging = Staging()
        self._pending: Future[Path] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        scheduler: Any = None,
        data: Any = None,
        metrics: Mapping[str, float] | None = None,
        extra: Any = None,
    ) -> None:
        """Save; on all ranks, between two steps. Waits for the save before this one, and then only for the copies.

        Args:
            step: How many steps the run has made.
            model: As it trains: plain, or under DDP, FSDP2, HSDP, tensor parallel.
            optimizer: One or more, of torch or like these.
            scheduler: What has state_dict() and load_state_dict(), of plain values and small tensors.
            data: Likewise; where the data of this rank goes on.
            metrics: Numbers, by one of which the best is kept.
            extra: What else the run wants back, of plain values and small tensors; rank 0's.

        Raises:
            CheckpointError: the save before this one failed, or this one where it is not asynchronous.
            ValueError: a state that cannot be saved, or ranks that save different steps.
        """
        self.wait()
        optimizers = _listed(optimizer)
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        plain: dict[str, Any] = {}

        def look() -> tuple[int, int, dict[str, dict[Part, int]]]:
            tensors["model"] = state.named_tensors(model, self._frozen)
            of_optimizers = state.optimizer_state(model, optimizers)
            tensors["optimizer"] = of_optimizers.tensors
            plain["of_run"] = {
                "config": state.config_class(model),
                "frozen": self._frozen,
                "optimizers": of_optimizers.plain,
                "scheduler": None if scheduler is None else encode(scheduler.state_dict(), "scheduler"),
                "extra": encode(extra, "extra"),
            }
            plain["of_rank"] = {"random": state.random_state(_device(tensors["model"]))}
            if data is not None:
                plain["of_rank"]["data"] = encode(data.state_dict(), "data")
            plain["metrics"] = _numbers(metrics or {})
            return step, self._data_rank()[0], {kind: own_parts(tensors[kind]) for kind in saving.KINDS}

        found = self._together.together(look)
        steps = [one[0] for one in found]
        if len(set(steps)) > 1 or type(step) is not int or step < 0:
            raise ValueError(f"save: the ranks save the steps {steps}; expected the same number on all, at least 0.")
        about = {
            **{"step": step, "metrics": plain["metrics"], "world_size": len(found), "mesh": self._mesh()},
            **{"data_ranks": [one[1] for one in found], "versions": saving.versions()},
        }
        parts = self._own_copies(tensors, [one[2] for one in found])
        job = saving.Job(
            step=step,
            parts=parts,
            event=_event(_device(tensors["model"])) if self._thread else None,
            shapes={kind: saving.shapes(tensors[kind]) for kind in saving.KINDS},
            of_rank=plain["of_rank"],
            of_run=plain["of_run"],
            about=about,
        )
        if self._thread is None:
            saving.save(self.folder, job, self._keep, self._writing)
        else:
            self._pending = self._thread.submit(saving.save, self.folder, job, self._keep, self._writing)

    def _own_copies(
        self, tensors: Mapping[str, Mapping[str, torch.Tensor]], held: list[dict[str, dict[Part, int]]]
    ) -> dict[str, dict[Part, torch.Tensor]]:
        """What this rank writes: copies, or where nothing runs on, the tensors themselves."""
        rank, own = self._together.rank, {}
        every: dict[str, torch.Tensor] = {}
        for kind in saving.KINDS:
            chosen = writers([one[kind] for one in held])
            own[kind] = {part for part, writer in chosen.items() if writer == rank}
            every.update({f"{kind}:{name}": tensor for name, tensor in tensors[kind].items()})
        if self._thread is None:
            return {kind: views(tensors[kind], own[kind]) for kind in saving.KINDS}
        wanted = {(f"{kind}:{part[0]}", *part[1:]) for kind in saving.KINDS for part in own[kind]}
        copies = self._staging.copy(every, wanted)
        return {
            kind: {part: copies[f"{kind}:{part[0]}", part[1], part[2]] for part in own[kind]} for kind in saving.KINDS
        }

    def load(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        scheduler: Any = None,
        data: Any = None,
        step: int | None = None,
        random_state: bool = True,
    ) -> Restored | None:
        """Restore the last checkpoint whose files are what was written; on all ranks, which may be others than saved it.

        A damaged one is passed over with a warning that names the file. Onto the same number of ranks everything goes on bit by bit.
        Onto another one: parameters and optimizer states are equal; rank r takes the random state of rank r, and ranks that there
        were not are seeded by step and rank; data as in `data_state`.

        Args:
            model: Filled in place, as it trains, after it was wrapped.
            optimizer: Made of its parameters, in the same groups.
            scheduler: With load_state_dict().
            data: Likewise.
            step: This one instead of the last; then a damaged one is an error.
            random_state: Whether the generators are set.

        Returns:
            What was restored; None where there is no checkpoint.

        Raises:
            ValueError: a checkpoint of another model, of other optimizers, or none of that step.
            DamagedError: there are checkpoints, but none is whole.
        """
        self.wait()
        found, problems = loading.candidates(self.folder, step, self._together)
        entry = loading.first_whole(self.folder, found[:1] if step is not None else found, problems, self._together)
        if entry is None:
            return None
        extra: Any = None

        def fill() -> None:
            nonlocal extra
            saved, stores = loading.read_state(entry)
            if scheduler is not None and saved["scheduler"] is None:
                raise ValueError(f"{entry.folder} was saved without a scheduler; leave scheduler out.")
            position = None if data is None else decode(loading.data_state(entry, *self._data_rank()))
            loading.read_tensors(entry, model, _listed(optimizer), saved, stores)
            if scheduler is not None:
                scheduler.load_state_dict(decode(saved["scheduler"]))
            if data is not None:
                data.load_state_dict(position)
            if random_state:
                device = _device(dict(model.named_parameters()))
                loading.read_random_state(entry, self._together.rank, device)
            extra = decode(saved["extra"])

        self._together.together(fill)
        return Restored(entry.step, entry.folder, entry.metrics, extra)

    def wait(self) -> None:
        """Wait until the last save is on the disk.

        Raises:
            CheckpointError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Path | None:
        """The folder of the checkpoint that was completed last; its files are not read."""
        found, _ = catalog.entries(self.folder)
        return found[0].folder if found else None

    def best(self) -> Path | None:
        """The folder of the best one by the metric, of those that are there."""
        found = self._keep.ranked(catalog.entries(self.folder)[0])
        return found[0].folder if found else None

    def stop_requested(self) -> bool:
        """Whether a signal asks the run to end; on all ranks, once a step. The same answer on all, and nobody waits for it.

        Then: save, leave the loop, `close`, and the process ends with code 0.
        """
        return self._stopping.requested()

    def close(self) -> None:
        """Wait for the last save, and let signals do what they did before; before destroy_process_group."""
        try:
            self.wait()
        finally:
            self._stopping.close()
            if self._thread is not None:
                self._thread.shutdown()

    def _data_rank(self) -> tuple[int, int]:
        """Which rank with rows of its own this is, and how many there are."""
        if self._ranks is not None:
            return self._ranks.data_rank, self._ranks.data_size
        return self._together.rank, self._together.size

    def _mesh(self) -> dict[str, int]:
        return {} if self._ranks is None else dict(zip(AXES, self._ranks.mesh.sizes))


def _listed(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    found = {name: float(value) for name, value in metrics.items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _device(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors.values()), torch.device("cpu"))


def _event(device: torch.device) -> Any:
    """Happens once the copies are there; on a CPU they are already."""
    if device.type == "cpu":
        return None
    event = torch.get_device_module(device).Event()
    event.record()
    return event
