"""The moving average of parameters."""

from pathlib import Path

import pytest
import torch
from torch import nn

from automodel_accel.checkpoint import Checkpoints
from automodel_accel.train.average import AVERAGE, ParameterAverage


def model() -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(2, 2, bias=True, dtype=torch.bfloat16)
    made.bias.requires_grad_(False)
    return made


def test_follows_the_definition() -> None:
    made = model()
    average = ParameterAverage(made.parameters(), decay=0.5)
    expected = made.weight.detach().float()
    for number in range(20):
        with torch.no_grad():
            made.weight.copy_(torch.randn(2, 2, generator=torch.Generator().manual_seed(number)))
        average.step()
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * made.weight.detach().float()
    assert list(average.state) == [made.weight]
    assert torch.allclose(average.state[made.weight][AVERAGE], expected, rtol=1e-6, atol=1e-7)


def test_stands_in_for_the_parameters_and_gives_them_back() -> None:
    made = model()
    average = ParameterAverage(made.parameters(), decay=0.9)
    with torch.no_grad():
        made.weight.add_(1.0)
    average.step()
    kept = made.weight.detach().clone()

    def fail_inside() -> None:
        with average.in_place():
            assert torch.equal(made.weight, average.state[made.weight][AVERAGE].bfloat16())
            assert not torch.equal(made.weight, kept)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.equal(made.weight, kept)


def test_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    made = model()
    first = ParameterAverage(made.parameters(), decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            made.weight.mul_(1.5)
        first.step()
    with Checkpoints(tmp_path, signals=()) as checkpoints:
        checkpoints.save(3, model=made, optimizer=first)
        again = model()
        second = ParameterAverage(again.parameters(), decay=0.9)
        assert checkpoints.load(model=again, optimizer=second) is not None
    for one, average in ((made, first), (again, second)):
        with torch.no_grad():
            one.weight.mul_(1.5)
        average.step()
    assert torch.equal(first.state[made.weight][AVERAGE], second.state[again.weight][AVERAGE])
    assert first.param_groups[0]["steps"] == second.param_groups[0]["steps"] == 4
