"""Count where the host waits for the device: what a training step should not do, seen on any machine, GPUs or none.

On a CPU nothing waits, but the operations that would wait on a GPU are the same, and are seen by torch's modes: reading a value
(item, tolist, bool of a tensor), shapes that depend on values (nonzero, masks as indices, unique), copies to "cpu". What the code
does for a CPU only is seen too; the counters of torch's optimizers, which are on the host beside a GPU as well, are not. On a GPU
torch's own warnings (torch.cuda.set_sync_debug_mode) are collected instead, which see copies from the host as well.

    with count_syncs() as syncs:
        step()
    assert not syncs, syncs
"""

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# operations that read values of the device to make their result; those whose kernels alone do so are among the others
_READS = frozenset(
    {
        *(_aten._local_scalar_dense, _aten.is_nonzero, _aten.equal, _aten.allclose),
        *(_aten.nonzero, _aten.masked_select, _aten.bincount, _aten.repeat_interleave),
        *(_aten._unique, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive, _aten.unique_dim_consecutive),
    }
)
_BY_MASK = frozenset({_aten.index, _aten.index_put, _aten.index_put_})
_TO_HOST = frozenset({"cpu", "numpy", "tolist", "__array__"})
_OWN = "automodel_accel"


@dataclass(frozen=True, slots=True)
class Sync:
    """One wait.

    Attributes:
        operation: Such as "item" or "nonzero".
        package: Whose code asked for it: the top package, or a script's name.
        place: "file:line function" of that code.
    """

    operation: str
    package: str
    place: str

    def __str__(self) -> str:
        return f"{self.operation} by {self.package} at {self.place}"


@contextmanager
def count_syncs() -> Iterator[list[Sync]]:
    """Collect the waits of what runs inside: in this thread on a CPU; on a GPU in all of the process."""
    found: list[Sync] = []
    with ExitStack() as stack:
        if torch.cuda.is_available():
            stack.enter_context(_warnings_of_cuda(found))
        else:
            stack.enter_context(_Functions(found))
            stack.enter_context(_Operations(found))
        yield found


class _Functions(TorchFunctionMode):
    """Sees copies to the host, which are no operation where the tensor is there already."""

    def __init__(self, found: list[Sync]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _TO_HOST or (name == "to" and _is_copy_to_host(args, kwargs)):
            self._found.append(_sync(name))
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees operations that read values, whoever calls them."""

    def __init__(self, found: list[Sync]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        packet = operation.overloadpacket
        if packet is _aten._local_scalar_dense and _is_optimizers_counter():
            pass
        elif packet in _READS and "output_size" not in (kwargs or {}):
            self._found.append(_sync("item" if packet is _aten._local_scalar_dense else packet.__name__))
        elif packet in _BY_MASK and any(_is_mask(index) for index in args[1]):
            self._found.append(_sync(f"{packet.__name__} by a mask"))
        return operation(*args, **(kwargs or {}))


def _is_copy_to_host(args: Any, kwargs: Mapping[str, Any]) -> bool:
    given = (*args[1:], *kwargs.values())
    # by name: a device that another tensor has may be a GPU elsewhere
    return "cpu" in [value for value in given if isinstance(value, str)] and not kwargs.get("non_blocking", False)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _is_optimizers_counter() -> bool:
    caller = next(
        frame
        for frame, _ in traceback.walk_stack(None)
        if "torch/optim/" in frame.f_code.co_filename or frame.f_back is None
    )
    return caller.f_code.co_name == "_get_value"


def _sync(operation: str) -> Sync:
    """Where the innermost code that is not torch's asked for it."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    outside = [frame for frame in frames if _package(frame.filename) != "torch"]
    frame = (outside or frames)[-1]
    return Sync(operation, _package(frame.filename), f"{frame.filename}:{frame.lineno} {frame.name}")


def _package(filename: str) -> str:
    """The top package that a file lies in, or its name where it lies in none."""
    path = Path(filename).resolve()
    for root in sorted(map(Path, filter(None, sys.path)), key=lambda folder: -len(folder.parts)):
        if path.is_relative_to(root.resolve()):
            parts = path.relative_to(root.resolve()).with_suffix("").parts
            return _OWN if parts[0] in ("kernels", "patches") and len(parts) > 1 else parts[0]
    return path.stem


@contextmanager
def _warnings_of_cuda(found: list[Sync]) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing" in str(warning.message):
            found.append(Sync("wait", _package(warning.filename), f"{warning.filename}:{warning.lineno}"))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
