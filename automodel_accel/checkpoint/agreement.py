"""Agreement: the ranks of a run do a thing together, and fail together."""

from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from automodel_accel.checkpoint.errors import CheckpointError

T = TypeVar("T")


class _Heard:
    """Keeps what a block raised, until the other ranks have heard of it."""

    error: BaseException | None = None

    def __enter__(self) -> "_Heard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return True


class Agreement(Generic[T]):
    """A group of its own for the processes of a run, on the host: it disturbs no collective of the training.

    Every process makes it at the same place. Without torch.distributed it is this process alone.
    """

    def __init__(self, timeout_minutes: float = 30.0) -> None:
        running = dist.is_available() and dist.is_initialized()
        self.group: Any = (
            dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes)) if running else None
        )
        self.rank = dist.get_rank() if running else 0
        self.size = dist.get_world_size() if running else 1

    def gather(self, value: T) -> list[T]:
        """The value of each rank."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def send_to_first(self, value: T) -> list[T] | None:
        """The value of each rank, on rank 0; None on the others."""
        if self.group is None:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, found, dst=0, group=self.group)
        return found

    def close(self) -> None:
        """Give the group back."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do the work on every rank; what each returned.

        Raises:
            BaseException: what the work raised on this rank, once the others know.
            CheckpointError: it failed on other ranks; says on which, and how. The kind of error is kept where it is one of ours.
        """
        value: Any = None
        with _Heard() as heard:
            value = work()
        said = None if heard.error is None else (type(heard.error), f"{heard.error}")
        found: list[Any] = self.gather((value, said))  # type: ignore[arg-type]
        if heard.error is not None:
            raise heard.error
        failed = [(rank, kind, words) for rank, (_, (kind, words)) in _failures(found)]
        if failed:
            rank, kind, words = failed[0]
            raise _kept(kind)(words if issubclass(kind, ValueError) else f"rank {rank}: {words}")
        return [value for value, _ in found]

    def alone(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0; every rank gets what it returned, or its error."""
        return self.together(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[arg-type, return-value]


def _failures(found: list[Any]) -> list[tuple[int, Any]]:
    return [(rank, outcome) for rank, outcome in enumerate(found) if outcome[1] is not None]


def _kept(kind: type[BaseException]) -> type[BaseException]:
    return kind if issubclass(kind, CheckpointError) or kind is ValueError else CheckpointError
