"""Who is missing: when processes wait for one that does not come, its rank and host are said.

A collective that a rank does not join ends in a timeout that names nobody. So each process writes into the store of the run,
first that it is there and then which step it has begun; whoever waits too long reads what the others have written.
"""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

logger = logging.getLogger("automodel_accel")
HERE, AT_STEP = "automodel_accel/here", "automodel_accel/step"
LOOK_SECONDS = 5.0
WARN_AT = 0.8  # of the timeout: NCCL's own ends the process at 1


def assemble(store: Store, rank: int, world_size: int, timeout: timedelta) -> None:
    """Wait for the processes of a run.

    Raises:
        TimeoutError: some have not come; their ranks.
    """
    store.set(f"{HERE}/{rank}", socket.gethostname())
    keys = [f"{HERE}/{other}" for other in range(world_size)]
    try:
        store.wait(keys, timeout)
    except dist.DistStoreError as error:
        missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        raise TimeoutError(
            f"after {_minutes(timeout)} minutes rank{'s' * (len(missing) > 1)} {', '.join(missing)} of {world_size} had not come; "
            "look at the log of their machines, or raise Mesh(timeout_minutes=...) where they need longer to start."
        ) from error


class Presence:
    """Says in the log who holds a run up, shortly before its collectives time out.

    Args:
        store: Of the run; one connection of its own, as a thread uses it.
        rank: Of this process.
        world_size: Of the run.
        timeout: Of its collectives.
        look_seconds: Between two looks of the thread.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, timeout: timedelta, look_seconds: float = LOOK_SECONDS
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._patience, self._look_seconds = WARN_AT * timeout.total_seconds(), look_seconds
        self._step, self._since = 0, time.monotonic()
        self._ended = threading.Event()

    def begin(self, step: int) -> None:
        """A step begins; nothing is sent here."""
        self._step, self._since = step, time.monotonic()

    @contextmanager
    def watching(self) -> Iterator["Presence"]:
        """Inside, a thread writes this rank's step, and looks at the others' when it has been the same for too long."""
        thread = threading.Thread(target=self._watch, name="presence", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()

    def late(self) -> list[tuple[int, int]]:
        """(rank, step) of those that have begun fewer steps than this one."""
        others = [(other, f"{AT_STEP}/{other}") for other in range(self._world_size) if other != self._rank]
        found = [(other, int(self._store.get(key)) if self._store.check([key]) else 0) for other, key in others]
        return [(other, step) for other, step in found if step < self._step]

    def _watch(self) -> None:
        written, warned = -1, False
        while True:
            step, waited = self._step, time.monotonic() - self._since
            if step != written:
                self._store.set(f"{AT_STEP}/{self._rank}", str(step))
                written, warned = step, False
            if waited > self._patience and not warned:
                warned = self._warn(step, waited)
            if self._ended.wait(self._look_seconds):
                return

    def _warn(self, step: int, waited: float) -> bool:
        late = self.late()
        for other, at in late:
            key = f"{HERE}/{other}"
            host = self._store.get(key).decode() if self._store.check([key]) else "an unknown host"
            logger.error(
                "rank %d waits at step %d since %.1f minutes for rank %d on %s, which has come to step %d only.",
                self._rank, step, waited / 60, other, host, at,
            )  # fmt: skip
        return bool(late)


def _minutes(timeout: timedelta) -> str:
    return f"{timeout.total_seconds() / 60:.2g}"
