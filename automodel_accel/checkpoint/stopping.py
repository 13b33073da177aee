"""Stopping: a signal that asks a run to end is heard by one process, and agreed on by all at the same step."""

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class Stopping:
    """Notes signals instead of dying of them, until `close`.

    Args:
        signals: Their names, such as "SIGTERM".
        group: The processes that have to agree; on the host. None for this one alone.

    Raises:
        ValueError: a signal that there is not, or this is not the main thread.
    """

    def __init__(self, signals: Sequence[str], group: Any) -> None:
        self.heard = ""
        self._group = group
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None
        self._before: dict[int, Any] = {}
        for name in signals:
            if (number := getattr(signal, name, None)) is None:
                raise ValueError(
                    f"signals: there is no {name!r}; expected names such as 'SIGTERM', 'SIGINT', 'SIGUSR1'."
                )
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError as error:
                raise ValueError(f"signals: {error}; make Checkpoints there, or give signals=().") from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.heard = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])  # a second Ctrl-C is not for us

    def requested(self) -> bool:
        """Whether any process has heard a signal, before its call of the step before this one; the same answer on all.

        The answers travel while the step computes: a call starts an all-reduce of one number in the memory of the host, and the next
        one reads it. So neither this process nor its device waits, and a signal is acted on one step later.
        """
        if self._group is None:
            return bool(self.heard)
        if self._pending is not None:
            self._pending.wait()
        agreed = bool(self._flag.item())
        self._flag.fill_(bool(self.heard) or agreed)
        self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def close(self) -> None:
        """Put back what the signals did before; a last all-reduce is left to itself, as a rank that failed may never join it."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
