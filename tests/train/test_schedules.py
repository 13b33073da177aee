"""Factors of the learning rate, step by step."""

import math
from itertools import pairwise

import pytest
import torch

from automodel_accel.train.schedules import Schedule


def factors(steps: int, **settings: object) -> list[float]:
    factor = Schedule(**settings).factors(steps)  # type: ignore[arg-type]
    return [factor(step) for step in range(steps + 1)]


def test_warmup_rises_by_even_steps_and_loses_none() -> None:
    assert factors(10, kind="constant", warmup=4)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors(100, kind="constant", warmup=0.04)[:6] == factors(100, kind="constant", warmup=4)[:6]


def test_ends() -> None:
    for kind, last in (("cosine", 0.1), ("linear", 0.1), ("constant", 1.0), ("wsd", 0.1)):
        found = factors(50, kind=kind, warmup=5, min_ratio=0.1)
        assert found[5] == 1.0
        assert found[-1] == pytest.approx(last)
        assert all(later <= earlier for earlier, later in pairwise(found[5:]))
        assert Schedule(kind=kind, warmup=5, min_ratio=0.1).factors(50)(70) == pytest.approx(last)  # type: ignore[arg-type]


def test_shapes() -> None:
    assert factors(20, kind="cosine", warmup=0)[10] == pytest.approx(0.5)
    assert factors(20, kind="cosine", warmup=0)[5] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factors(20, kind="linear", warmup=0)[5] == pytest.approx(0.75)
    stable = factors(20, kind="wsd", warmup=2, decay=8)
    assert stable[2:13] == [1.0] * 11
    assert stable[14] == pytest.approx(1 - math.sqrt(2 / 8))


def test_moves_each_group_from_its_own_rate() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.1}])
    scheduler = Schedule(kind="linear", warmup=0).build(optimizer, 4)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert seen == [pytest.approx([rate, rate / 10]) for rate in (1.0, 0.75, 0.5, 0.25)]


@pytest.mark.parametrize(("settings", "said"), [({"warmup": -1}, "warmup is -1"), ({"min_ratio": 2}, "min_ratio is 2")])
def test_wrong_settings(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Schedule(**settings)  # type: ignore[arg-type]


def test_more_warmup_than_steps() -> None:
    with pytest.raises(ValueError, match=r"warmup takes 11 steps, but the run has 10"):
        factors(10, warmup=11)
    with pytest.raises(ValueError, match=r"warmup takes 6 steps and decay 5, but the run has 10"):
        factors(10, kind="wsd", warmup=6, decay=5)
