"""The memory that operations ask for, found by watching what torch dispatches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, records the memory of every tensor that an operation returns and that is not one of its arguments.

    Attributes:
        operations: Names of all operations, in order.
        sizes: Bytes of each new memory, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at its results."""
        kwargs = kwargs or {}
        known = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        results = function(*args, **kwargs)
        self.operations.append(str(function))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and _address(x) not in known:
                self.sizes.append(x.untyped_storage().nbytes())
        return results


def _address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()
