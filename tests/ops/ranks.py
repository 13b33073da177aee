"""Ranks of a process group as threads of this process, and an operation that is cut over them as one of whole tensors."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg

from automodel_accel.kernels.linear_cross_entropy.shard import VocabShard

OF_VOCAB = (1, 2, 5)  # of hidden, weight, bias, target, lora_x, lora_b: those that have a row a class


def on_ranks(world_size: int, function: Callable[[int, Any], Any]) -> list[Any]:
    """What function(rank, group) returns on each rank; raises what the first rank raised that failed."""
    store = dist.HashStore()

    def run(rank: int) -> Any:
        failed = True
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            found = function(rank, dist.group.WORLD)
            dist.barrier()
            failed = False
        finally:
            if failed:  # the others would wait for ever; these exit
                multi_threaded_pg.ProcessLocalGroup.exception_handle(None)
            dist.destroy_process_group()
        return found

    with _threads_for_ranks(), ThreadPoolExecutor(world_size) as pool:
        ranks = [pool.submit(run, rank) for rank in range(world_size)]
    for error in (rank.exception() for rank in ranks):
        if error is not None and not isinstance(error, SystemExit):
            raise error
    return [rank.result() for rank in ranks]


@contextmanager
def _threads_for_ranks() -> Iterator[None]:
    multi_threaded_pg.ProcessLocalGroup.reset()
    multi_threaded_pg._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        yield
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        multi_threaded_pg._uninstall_threaded_pg()


@contextmanager
def one_at_a_time(*modules: ModuleType) -> Iterator[None]:
    """Inside, one thread at a time runs these modules' functions for shards: Triton's interpreter knows one launch at a time."""
    lock = threading.Lock()

    def locked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with lock:
                return function(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name in ("shard_forward", "shard_backward", "scale_"):
                patch.setattr(module, name, locked(getattr(module, name)))
        yield


@dataclass(frozen=True, slots=True)
class RowsAcross:
    """An implementation's two functions on rows of all logits, computed by ranks that hold classes between `cuts`."""

    sharded: Callable[..., Any]
    module: ModuleType
    cuts: Sequence[int]

    def forward(self, logits: torch.Tensor, *others: Any) -> torch.Tensor:
        """As of the implementation."""
        return self._run("forward", logits.clone(), *others)

    def backward(self, logits: torch.Tensor, *others: Any) -> torch.Tensor:
        """As of the implementation: the logits become their gradient."""
        return self._run("backward", logits, *others)

    def _run(self, name: str, logits: torch.Tensor, *others: Any) -> torch.Tensor:
        def one(rank: int, group: Any) -> torch.Tensor:
            start, stop = self.cuts[rank], self.cuts[rank + 1]
            padded = logits.new_full((logits.shape[0], -(-(stop - start) // 16) * 16), float("nan"))
            own = padded[:, : stop - start].copy_(logits[:, start:stop])
            loss = getattr(self.sharded(self.module, group, start, self.cuts[-1]), name)(own, *others)
            logits[:, start:stop] = own
            return loss  # type: ignore[no-any-return]

        return same(on_ranks(len(self.cuts) - 1, one))


def same(losses: list[torch.Tensor]) -> torch.Tensor:
    """The one loss that all ranks have, bit for bit."""
    for loss in losses:
        assert torch.equal(loss.nan_to_num(3.0), losses[0].nan_to_num(3.0)), "the loss differs between ranks"
    return losses[0]


def across(call: Callable[..., torch.Tensor], cuts: Sequence[int], *inputs: Any) -> torch.Tensor:
    """The loss of whole tensors (hidden, weight, bias, target, lora_x, lora_b), computed by ranks that hold rows of the vocabulary.

    Args:
        call: (*inputs of one rank, shard) -> loss, which must be the same on all ranks.
        cuts: Where the vocabulary is cut: 0, ..., V; one more than there are ranks.
        inputs: Whole; the gradients of hidden and lora_x are the sums of the ranks' shares, those of weight, bias and lora_b their rows.
    """
    inputs = (*inputs, *(None,) * (6 - len(inputs)))
    return _Across.apply(call, tuple(cuts), *inputs)  # type: ignore[no-any-return, no-untyped-call]


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Callable[..., torch.Tensor], cuts: tuple[int, ...], *inputs: Any) -> torch.Tensor:
        needs = ctx.needs_input_grad[2:]

        def one(rank: int, group: Any) -> tuple[torch.Tensor, list[Any]]:
            rows = slice(cuts[rank], cuts[rank + 1])
            own = [x[rows] if x is not None and i in OF_VOCAB else x for i, x in enumerate(inputs)]
            leaves = [x if x is None else x.detach().clone().requires_grad_(need) for x, need in zip(own, needs)]
            return call(*leaves, VocabShard(group, rows.start, rows.stop, cuts[-1])), leaves

        ctx.ranks, ctx.needs = on_ranks(len(cuts) - 1, one), needs
        return same([loss.detach() for loss, _ in ctx.ranks]).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        def one(rank: int, group: Any) -> Any:
            loss, leaves = ctx.ranks[rank]
            wanted = [leaf for leaf, need in zip(leaves, ctx.needs) if need]
            return iter(torch.autograd.grad(loss, wanted, grad_output, retain_graph=True))

        ranks = on_ranks(len(ctx.ranks), one)
        grads: list[torch.Tensor | None] = []
        for i, need in enumerate(ctx.needs):
            parts = [next(rank) for rank in ranks] if need else None
            grads.append(None if parts is None else torch.cat(parts) if i in OF_VOCAB else torch.stack(parts).sum(0))
        return None, None, *grads
