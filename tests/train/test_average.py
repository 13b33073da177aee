"""The moving average of parameters."""

import pytest
import torch
from torch import nn

from automodel_accel.train.average import ParameterAverage


def model() -> nn.Linear:
    made = nn.Linear(2, 2, bias=True, dtype=torch.bfloat16)
    made.bias.requires_grad_(False)
    return made


def test_follows_the_definition() -> None:
    made = model()
    average = ParameterAverage(made, decay=0.5)
    expected = made.weight.detach().float()
    for number in range(20):
        with torch.no_grad():
            made.weight.copy_(torch.randn(2, 2, generator=torch.Generator().manual_seed(number)))
        average.update()
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * made.weight.detach().float()
    found = average.state_dict()
    assert set(found) == {"weight", "updates"}
    assert torch.allclose(found["weight"], expected, rtol=1e-6, atol=1e-7)


def test_stands_in_for_the_parameters_and_gives_them_back() -> None:
    made = model()
    average = ParameterAverage(made, decay=0.9)
    with torch.no_grad():
        made.weight.add_(1.0)
    average.update()
    kept = made.weight.detach().clone()

    def fail_inside() -> None:
        with average.in_place():
            assert torch.equal(made.weight, average.state_dict()["weight"].bfloat16())
            assert not torch.equal(made.weight, kept)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.equal(made.weight, kept)


def test_goes_on_where_it_was_saved() -> None:
    made = model()
    first = ParameterAverage(made, decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            made.weight.mul_(1.5)
        first.update()
    second = ParameterAverage(made, decay=0.9)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    with torch.no_grad():
        made.weight.mul_(1.5)
    for average in (first, second):
        average.update()
    assert torch.equal(first.state_dict()["weight"], second.state_dict()["weight"])
    assert first.state_dict()["updates"] == second.state_dict()["updates"] == 4
