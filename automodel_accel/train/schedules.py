"""Learning rate schedules: factors on each group's own rate, one per optimizer step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How the learning rate moves over the steps of a run.

    Attributes:
        kind: "cosine" (half a wave), "linear", "constant", or "wsd" (warm up, stay, decay; Hu et al., "MiniCPM", 2024).
        warmup: Steps from 0 to the full rate, linearly; below 1, a share of all steps.
        decay: Of "wsd": how many of the last steps the rate falls in, by one minus the square root; below 1, a share of all steps.
        min_ratio: The factor that the rate ends at.

    Raises:
        ValueError: a number of steps below 0, or a ratio outside of 0 to 1.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = 0.03
    decay: float = 0.2
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup", "decay"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected a number of steps, or a share of all below 1."
                )
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio is {self.min_ratio}; expected a factor from 0 to 1.")

    def factors(self, steps: int) -> Callable[[int], float]:
        """The factor of each step, counted from 0, of a run of `steps`; after them it stays.

        Raises:
            ValueError: warmup and decay take more steps than there are.
        """
        warmup, decay = _steps(self.warmup, steps), _steps(self.decay, steps)
        if warmup > steps or (self.kind == "wsd" and warmup + decay > steps):
            raise ValueError(
                f"schedule: warmup takes {warmup} steps{f' and decay {decay}' if self.kind == 'wsd' else ''}, but the run has "
                f"{steps}; make them fewer, or a share of all (below 1)."
            )

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)  # no step is lost to a rate of 0
            begun = steps - decay if self.kind == "wsd" else warmup
            done = min(max((step - begun) / max(1, steps - begun), 0.0), 1.0)
            return self.min_ratio + (1 - self.min_ratio) * self._left(done)

        return factor

    def _left(self, done: float) -> float:
        if self.kind == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        if self.kind == "linear":
            return 1 - done
        return 1.0 if self.kind == "constant" else 1 - math.sqrt(done)

    def build(self, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        """Torch's scheduler that follows it; call its `step` after each step of the optimizer."""
        return LambdaLR(optimizer, self.factors(steps))


def _steps(given: float, steps: int) -> int:
    return round(given * steps) if given < 1 else round(given)
