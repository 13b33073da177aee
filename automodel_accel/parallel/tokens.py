"""The sums of a training step over all ranks, in one all-reduce that nobody waits for: label tokens, losses, and what is noted.

A step's loss is the sum over all its labels, of every micro-batch of every rank, divided by their number. That number is counted
before the first forward; with it goes what the step before has left: its loss, and whatever was noted (a wish to stop, a
metric). All stays on the device; the host waits for nothing until it reads a figure.

    sums = StepSums(ranks, device)
    for batches in steps:                             # the micro-batches of a step
        step = sums.begin(batches)
        for batch in batches:
            loss = model(**batch, num_items_in_batch=step.items).loss
            loss.backward()
            sums.add(loss)
        optimizer.step()
        if log: figures = step.before.read()          # of the step before; the one place that waits for the device
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from automodel_accel.parallel.mesh import Mesh, Ranks

IGNORED = -100
# exact up to 2^53 tokens, which float32 is not; a device that has no float64 takes float32
_EXACT = {"mps": torch.float32}


def label_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """How many tokens of a batch have a label: with `labels`, the first of a row has none that could predict it.

    Raises:
        ValueError: neither `labels` nor `shift_labels` is in the batch.
    """
    shifted, labels = batch.get("shift_labels"), batch.get("labels")
    if shifted is None and labels is None:
        raise ValueError(f"a batch has {sorted(batch)}; expected labels among them, to count their tokens.")
    return ((labels[..., 1:] if shifted is None else shifted) != IGNORED).sum()  # type: ignore[index, no-any-return]


@dataclass(frozen=True, slots=True)
class Figures:
    """What all ranks left of a step, on the device.

    Attributes:
        names: Of the values: "loss", "tokens", and what was noted.
        values: One each, float64: the loss of the whole step, its label tokens, and the sums of the others over the ranks that
            have rows of their own.
    """

    names: tuple[str, ...]
    values: torch.Tensor

    def read(self) -> dict[str, float]:
        """As numbers; waits for the device."""
        return dict(zip(self.names, self.values.tolist(), strict=True))


class Step:
    """One step's sums, under way."""

    def __init__(self, packed: torch.Tensor, work: Any, ranks: Ranks, before: tuple[str, ...], tokens: Any) -> None:
        self._packed, self._work, self._mesh = packed, work, ranks.mesh
        self._before, self._tokens_before = before, tokens

    def _sums(self) -> torch.Tensor:
        if self._work is not None:
            self._work.wait()  # of NCCL: the stream waits, the host does not
            self._work = None
        return self._packed

    @property
    def tokens(self) -> torch.Tensor:
        """Label tokens of all micro-batches of all ranks; 0-dimensional, on the device."""
        return self._sums()[0] / self._mesh.context

    @property
    def items(self) -> torch.Tensor:
        """`num_items_in_batch` of each forward, float32: tokens / ranks, as gradients are averaged over the ranks.

        For a model that takes none: the sum of its losses / items. A step without labels has a loss of 0.
        """
        return (self.tokens.clamp_min(1) / _size(self._mesh)).float()

    @property
    def before(self) -> Figures | None:
        """What the step before left; None in the first one."""
        if self._tokens_before is None:
            return None
        loss, *notes = self._sums()[1:]
        values = [loss / _size(self._mesh), self._tokens_before, *(note / self._mesh.context for note in notes)]
        return Figures(("loss", "tokens", *self._before), torch.stack(values))


def _size(mesh: Mesh) -> int:
    """How many ranks see tokens of their own."""
    return mesh.replicate * mesh.shard * mesh.context


class StepSums:
    """Begins steps, and collects what they leave.

    Args:
        ranks: Whose `tokens_group` sums. Micro-batches are those of a rank of data (Ranks.data_rank): ranks of the context axis,
            which cut rows in the forward, are given the whole rows.
        device: Where the model lives.
    """

    def __init__(self, ranks: Ranks, device: torch.device | str) -> None:
        self._ranks, self._device = ranks, torch.device(device)
        self._dtype = _EXACT.get(self._device.type, torch.float64)
        self._loss: torch.Tensor | None = None
        self._notes: dict[str, torch.Tensor] = {}
        self._last: Step | None = None

    def begin(self, batches: Iterable[Mapping[str, Any]]) -> Step:
        """Count the labels of a step's micro-batches: starts the all-reduce, which `Step.items` waits for."""
        counts = [label_tokens(batch).to(self._device, non_blocking=True) for batch in batches]
        if not counts:
            raise ValueError("a step without micro-batches; expected at least one.")
        return self._reduce(torch.stack(counts).sum())

    def add(self, loss: torch.Tensor) -> None:
        """The loss of a micro-batch, as the model returned it with `Step.items`."""
        loss = loss.detach().to(self._dtype)
        self._loss = loss if self._loss is None else self._loss + loss

    def note(self, **values: float | torch.Tensor) -> None:
        """Figures of this rank to sum with the next step's count: stop=True, lines=17. Every rank notes the same names."""
        for name, value in values.items():
            # filled on the device: a copy from the host would wait
            told = value.detach() if isinstance(value, torch.Tensor) else self._full(float(value))
            self._notes[name] = told.to(self._device, self._dtype, non_blocking=True)

    def end(self) -> Figures | None:
        """What the last step left, when none follows."""
        return self._reduce(self._full(0.0)).before

    def _reduce(self, count: torch.Tensor) -> Step:
        loss = self._full(0.0) if self._loss is None else self._loss
        packed, group = torch.stack([count.to(self._dtype), loss, *self._notes.values()]), self._ranks.tokens_group
        work = dist.all_reduce(packed, group=group, async_op=True) if group is not None else None
        tokens = None if self._last is None else self._last.tokens
        self._last = Step(packed, work, self._ranks, tuple(self._notes), tokens)
        self._loss, self._notes = None, {}
        return self._last

    def _full(self, value: float) -> torch.Tensor:
        return torch.full((), value, dtype=self._dtype, device=self._device)
