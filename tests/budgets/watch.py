"""What would run on a GPU, counted on a CPU: launches of kernels, and the bytes that each asks of memory.

A Triton kernel runs in the interpreter: every load and store counts the lanes that its mask lets through. An operation of torch
counts where it would launch a kernel, with the bytes of its inputs and outputs; views and the making of empty memory launch none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
    "_unsafe_view",
    "_reshape_alias",
    "lift_fresh",
}
OVERWRITES = {"copy_", "fill_", "zero_", "index_put_"}  # their first argument is written, and not read


@dataclass(slots=True)
class Launch:
    """One kernel.

    Attributes:
        name: Of the Triton kernel, or of the operation of torch.
        read: Bytes that it reads.
        written: Bytes that it writes.
    """

    name: str
    read: int = 0
    written: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, records every launch, in order, in `launches`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []
        self._inside: Launch | None = None  # the Triton kernel that is running
        self._patches = pytest.MonkeyPatch()

    @property
    def moved(self) -> int:
        """Bytes that all launches read and write."""
        return sum(launch.moved for launch in self.launches)

    def __enter__(self) -> "Watch":
        """Count, until the end of the block."""
        self._patches.setattr(GridExecutor, "__call__", self._counting_launches(GridExecutor.__call__))
        for name, written in (("create_masked_load", False), ("create_masked_store", True)):
            self._patches.setattr(
                InterpreterBuilder, name, self._counting_bytes(getattr(InterpreterBuilder, name), written)
            )
        self._patches.setattr(
            InterpreterBuilder, "create_atomic_rmw", self._counting_atomics(InterpreterBuilder.create_atomic_rmw)
        )
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave Triton as it was."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.undo()

    def _counting_launches(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(executor: Any, *arguments: Any, **options: Any) -> Any:
            self._inside = Launch(executor.fn.__name__)
            self.launches.append(self._inside)
            try:
                return original(executor, *arguments, **options)
            finally:
                self._inside = None

        return call

    def _counting_bytes(self, original: Callable[..., Any], written: bool) -> Callable[..., Any]:
        def access(builder: Any, pointers: Any, *arguments: Any) -> Any:
            mask = arguments[1] if written else arguments[0]
            self._count(pointers, mask, read=not written, written=written)
            return original(builder, pointers, *arguments)

        return access

    def _counting_atomics(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def access(builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *arguments: Any) -> Any:
            self._count(pointers, mask, read=True, written=True)
            return original(builder, operation, pointers, value, mask, *arguments)

        return access

    def _count(self, pointers: Any, mask: Any, read: bool, written: bool) -> None:
        assert self._inside is not None
        size = int(mask.data.sum()) * max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        self._inside.read += size * read
        self._inside.written += size * written

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and count it where it would launch a kernel."""
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        name = function._schema.name.partition("::")[2]
        if self._inside is not None or function.is_view or name in NO_LAUNCH:
            return results
        written = _bytes(results)
        if written:
            first = 1 if name in OVERWRITES else 0
            read = _bytes((args[first:], {key: value for key, value in kwargs.items() if key != "out"}))
            self.launches.append(Launch(name, read, written))
        return results


def _bytes(values: Any) -> int:
    """Bytes of all tensors in `values`; an element that a stride of 0 repeats counts once."""
    return sum(_distinct(x) * x.element_size() for x in tree_leaves(values) if isinstance(x, torch.Tensor))


def _distinct(x: torch.Tensor) -> int:
    count = 1
    for size, stride in zip(x.shape, x.stride()):
        count *= size if stride or size == 0 else 1
    return count
