"""An exponential moving average of the parameters that train, often better than the last ones.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

AVERAGE = "average"  # of a parameter's state


class ParameterAverage(Optimizer):
    """The average, in float32, of this rank's parts of the parameters.

    An optimizer that steps nothing: its state lies where a checkpoint looks for states of parameters, cut over ranks like these.

    Args:
        parameters: Those that train, after the model was sharded.
        decay: What stays of the average at each step: the average is over about 1 / (1 - decay) steps. The first steps take
            less, (1 + n) / (10 + n), so that where the run began is soon forgotten.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        super().__init__([one for one in parameters if one.requires_grad], {"decay": decay, "steps": 0})
        for parameter in self._own():
            self.state[parameter][AVERAGE] = parameter.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Once after each step of the other optimizer; no waiting for the device."""
        for group in self.param_groups:
            done = group["steps"]
            decay = min(group["decay"], (1 + done) / (10 + done))
            group["steps"] = done + 1
            averages = [_local(self.state[parameter][AVERAGE]) for parameter in group["params"]]
            now = [_local(parameter.detach()).to(torch.float32) for parameter in group["params"]]
            torch._foreach_lerp_(averages, now, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages for parameters, to be validated or saved; after it, its own again."""
        kept = [parameter.detach().clone() for parameter in self._own()]
        self.write()
        try:
            yield
        finally:
            _write(self._own(), kept)

    def write(self) -> None:
        """Give the model the averages for parameters, for good."""
        _write(self._own(), [self.state[parameter][AVERAGE] for parameter in self._own()])

    def _own(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


@torch.no_grad()
def _write(parameters: Iterable[nn.Parameter], values: Iterable[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
