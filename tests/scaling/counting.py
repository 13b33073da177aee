"""One rank of many that are not there: torch's fake process group, in which collectives send nothing, and what is counted in it."""

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operation of torch -> the collective, as scaling/traffic.py calls it
COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}


@contextmanager
def ranks(world_size: int) -> Iterator[None]:
    """torch.distributed with so many ranks, of which this process is the first."""
    fake = importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, adds up what is gathered or summed.

    Attributes:
        whole: (collective, ranks) -> bytes of all that is gathered or summed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.whole: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and look at its tensors where it is a collective."""
        if function.namespace == "c10d" and (name := function.overloadpacket.__name__) in COLLECTIVES:
            collective = COLLECTIVES[name]
            given = [sum(x.nbytes for x in tree_leaves(arg) if isinstance(x, torch.Tensor)) for arg in args]
            self.whole[collective, self._ranks(args)] += max(given)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _ranks(args: tuple[Any, ...]) -> int:
        groups = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        return int(dist.ProcessGroup.unbox(groups[0]).size())


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, follows the memory of every tensor that an operation returns, until it is freed or shrunk.

    Attributes:
        peak: The most bytes that were held at once, beside what was given.
    """

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._given = {x.untyped_storage()._cdata for x in given}
        self._seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at all memory."""
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and not isinstance(x, DTensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._given:
                    self._seen.setdefault(storage._cdata, StorageWeakRef(storage))
        sizes = {key: _size(reference) for key, reference in self._seen.items()}
        self._seen = {key: reference for key, reference in self._seen.items() if sizes[key] is not None}
        self.peak = max(self.peak, sum(size or 0 for size in sizes.values()))
        return results


def _size(reference: StorageWeakRef) -> int | None:
    """Bytes now: FSDP2 shrinks memory to nothing, and lets it grow again. None where it is gone."""
    storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return None if storage is None else storage.nbytes()


def local_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of this rank's parts, each memory once."""
    parts = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values())
