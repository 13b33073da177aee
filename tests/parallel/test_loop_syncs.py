"""Where a step waits for the device: each kind is seen, and a step with everything on waits nowhere but where it says so."""

from functools import cache

import torch
from torch import nn

import automodel_accel as accel
from automodel_accel.parallel.mesh import Mesh
from automodel_accel.parallel.sync_count import Sync, count_syncs
from automodel_accel.parallel.tokens import StepSums
from tests.tiny import batch, tiny

# what this library's code does for a CPU only; each function looks at the device first, and says so
FOR_A_CPU = {"check_targets", "rows_that_count", "scale_"}


def _operations(syncs: list[Sync]) -> list[str]:
    return [sync.operation for sync in syncs]


def test_every_kind_of_wait_is_seen_and_placed() -> None:
    x = torch.arange(4.0)
    with count_syncs() as syncs:
        x.sum().item()
        bool(x.any())
        float(x[0])
        x.tolist()
        x.cpu()
        x.to("cpu")
        x.numpy()
        x.nonzero()
        x[x > 1]
        x[x > 1] = 0
        torch.masked_select(x, x > 0)
        torch.unique(x)
        torch.repeat_interleave(x, x.long())
        nn.functional.one_hot(x.long())
    expected = ["item", "item", "item", "tolist", "cpu", "to", "numpy", "nonzero", "index by a mask"]
    expected += ["index_put_ by a mask", "masked_select", "_unique2", "repeat_interleave"]
    assert _operations(syncs)[: len(expected)] == expected
    assert set(_operations(syncs)[len(expected) :]) == {"item"}  # one_hot looks at the smallest and the largest class
    assert {sync.package for sync in syncs} == {"tests"}
    assert all("test_every_kind_of_wait_is_seen_and_placed" in sync.place for sync in syncs)


def test_what_does_not_wait_is_not_counted() -> None:
    x, index = torch.arange(4.0), torch.tensor([1, 2])
    with count_syncs() as syncs:
        x.to("cpu", non_blocking=True)
        x.to(index.device)
        x[index]
        torch.where(x > 1, x, 0.0)
        torch.repeat_interleave(x, 2)
        x.argsort()
        torch.full((), 3.0)
    assert not syncs


@cache
def _model() -> nn.Module:
    return accel.apply(tiny("qwen3"))


class _Loop:
    """A training step with everything on: fusions, counts, accumulation, clipping, a schedule, all tensors at once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda number: 0.9**number)
        self.sums = StepSums(Mesh(shard=1).ranks("cpu"), "cpu")

    def step(self) -> None:
        batches = [batch(2, 24, 5), batch(2, 24, 3)]
        step = self.sums.begin(batches)
        for given in batches:
            loss = self.model(**given, num_items_in_batch=step.items).loss
            loss.backward()
            self.sums.add(loss)
        self.sums.note(stop=False, lines=3)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def test_a_step_waits_nowhere_but_for_a_cpu() -> None:
    loop = _Loop(_model())
    loop.step()
    with count_syncs() as syncs:
        loop.step()
    assert {sync.place.split()[-1] for sync in syncs} == FOR_A_CPU, syncs
    assert {sync.package for sync in syncs} == {"automodel_accel"}


def test_a_wait_that_a_step_gains_is_found() -> None:
    loop = _Loop(tiny("llama"))
    loop.model.register_forward_hook(lambda module, args, output: output.loss.item() and None)
    loop.step()
    with count_syncs() as syncs:
        loop.step()
    assert [sync.operation for sync in syncs if sync.package == "tests"] == ["item"] * 2


def test_what_is_logged_waits_once() -> None:
    loop = _Loop(tiny("llama"))
    loop.step()
    figures = loop.sums.begin([batch()]).before
    assert figures is not None
    with count_syncs() as syncs:
        read = figures.read()
    assert _operations(syncs) == ["tolist"]
    assert list(read) == ["loss", "tokens", "stop", "lines"]


def test_positions_are_looked_at_once_where_the_model_counts_them() -> None:
    """And each time where they are given: rows of the same length that are packed are not taken for plain ones."""
    model, vanilla = accel.apply(tiny("llama")), tiny("llama")
    packed = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
    for given in ({}, {}, {"position_ids": packed}, {}):
        ours, theirs = (one(**batch(), **given, use_cache=False).loss for one in (model, vanilla))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
