"""Peak memory of the loss without logits: what torch holds at once beyond inputs and gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from automodel_accel.kernels.linear_cross_entropy import linear_cross_entropy
from tests.budgets.ledger import Figures

TOKENS, HIDDEN, VOCABULARY = 64, 96, 8192
CHUNK = 16
DTYPE = torch.bfloat16


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, follows the memory of every tensor that an operation returns, until it is freed.

    Attributes:
        bytes: The most that was held at once, without the tensors that were given.
    """

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self._given = {x.untyped_storage()._cdata for x in given}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at its results."""
        results = function(*args, **(kwargs or {}))
        self._held = {key: entry for key, entry in self._held.items() if not entry[0].expired()}
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self._given:
                storage = x.untyped_storage()
                self._held.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.bytes = max(self.bytes, sum(size for _, size in self._held.values()))
        return results


def figures() -> Figures:
    """The peak over inputs and gradients, in chunks of logits; the whole logits are `TOKENS / CHUNK` of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(DTYPE).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(DTYPE).requires_grad_()
    target = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    chunk = CHUNK * VOCABULARY * DTYPE.itemsize
    gradients = (x.numel() + weight.numel()) * DTYPE.itemsize
    with Peak(x, weight, target) as peak:
        loss = linear_cross_entropy(x, weight, target, workspace_bytes=chunk, implementation="triton")
        torch.autograd.grad(loss, (x, weight))
    return {"linear_cross_entropy / chunks": round((peak.bytes - gradients) / chunk, 3)}
