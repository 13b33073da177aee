"""Optimizers: groups by pattern, decay of matrices only, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from automodel_accel.train.optimizers import Group, Optimizer


def model() -> nn.Module:
    made = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    made[2].bias.requires_grad_(False)
    return made


def settings_of(optimizer: torch.optim.Optimizer, one: nn.Parameter) -> tuple[float, float]:
    group = next(group for group in optimizer.param_groups if any(one is other for other in group["params"]))
    return group["lr"], group["weight_decay"]


def test_groups() -> None:
    made: Any = model()
    groups = (Group(pattern="0.*", lr=1e-2), Group(pattern="*.bias", weight_decay=0.3), Group(pattern="*", lr=5.0))
    optimizer = Optimizer(lr=1e-3, weight_decay=0.1, groups=groups[:2]).build(made.named_parameters())
    assert settings_of(optimizer, made[0].weight) == (1e-2, 0.1)
    assert settings_of(optimizer, made[1].weight) == (1e-3, 0.1)
    assert settings_of(optimizer, made[1].bias) == (1e-3, 0.3)
    assert settings_of(optimizer, made[2].weight) == (1e-3, 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4  # the frozen bias is in none
    assert settings_of(Optimizer(groups=groups).build(made.named_parameters()), made[2].weight) == (5.0, 0.0)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "adafactor", "adamw8bit"])
def test_each_kind_takes_a_step(kind: Any) -> None:
    made = model()
    before = [one.detach().clone() for one in made.parameters() if one.requires_grad]
    optimizer = Optimizer(kind=kind, lr=0.1).build(made.named_parameters())
    made(torch.tensor([[0, 1, 2, 3, 4]])).square().sum().backward()
    optimizer.step()
    after = [one for one in made.parameters() if one.requires_grad]
    assert not any(torch.equal(first, second) for first, second in zip(before, after, strict=True))


def test_what_is_refused() -> None:
    made = model()
    with pytest.raises(ValueError, match=r"'lm_head\*' fits no parameter that trains, such as 0.weight"):
        Optimizer(groups=(Group(pattern="lm_head*"),)).build(made.named_parameters())
    with pytest.raises(ValueError, match="no parameter trains"):
        Optimizer().build(made.requires_grad_(False).named_parameters())
    with pytest.raises(ValueError, match="betas are"):
        Optimizer(betas=(0.9,))
    with pytest.raises(ValueError, match="lr is -1"):
        Optimizer(lr=-1)
