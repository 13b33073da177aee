"""An exponential moving average of the parameters that train, often better than the last ones.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class ParameterAverage:
    """The average, in float32, of this rank's parts of the parameters.

    Args:
        model: Whose trainable parameters are averaged; after it was sharded.
        decay: What stays of the average at each update: the average is over about 1 / (1 - decay) steps. The first steps take
            less, (1 + n) / (10 + n), so that where the run began is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay, self._updates = decay, 0
        self._own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._average = {name: parameter.detach().float().clone() for name, parameter in self._own.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Once after each step of the optimizer; no waiting for the device."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        averages = [_local(average) for average in self._average.values()]
        now = [_local(parameter.detach()).to(torch.float32) for parameter in self._own.values()]
        torch._foreach_lerp_(averages, now, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages for parameters, to be validated or saved; after it, its own again."""
        kept = {name: parameter.detach().clone() for name, parameter in self._own.items()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by name, sharded as the parameters are, and the number of updates."""
        return {**self._average, "updates": torch.tensor(self._updates)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take what `state_dict` gave, of the same model on the same mesh."""
        self._updates = int(state["updates"])
        for name, average in self._average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._own.items():
            parameter.copy_(values[name])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
