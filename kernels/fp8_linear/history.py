"""The largest values of the last calls, from which delayed scaling takes the scale of the next.

    scale = 2^MARGIN 2^ceil(log2(largest of the last LENGTH calls / max))           of an empty history: current scaling

Sources: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; NVIDIA's Transformer Engine, `DelayedScaling` (a history of
which the largest counts, scale 1 where it is all zeros). LENGTH is the 16 of the former's recipes rather than the latter's 1024,
which a spike would rule for 1024 calls.

MARGIN: one power of two between the largest value and the end of the format. A value may double from one call to the next before
any saturates; in a floating point format all else is rounded as before, but for what lies within one power of two of zero's end
(of E4M3's 18 powers of two that is one). What doubles more saturates, is counted, and is in the history at the next call.

A call with an infinity or a NaN leaves the history as it was: loops skip such a step, and the next one must not pay for it.
A forward that runs twice (checkpoints) is two calls: the scale of the second may differ, and its backward is of the second.
"""

from dataclasses import dataclass, field

import torch

from automodel_accel.kernels.fp8_linear.scaling import scale_of

LENGTH = 16
MARGIN = 1


class History:
    """Of the calls of one operand; nothing of it is ever asked of the device by a call.

    Attributes:
        calls: How many there were on this device, known to the host.
        amaxes: Float32 [LENGTH]: largest absolute values, a ring: call n stands at n % LENGTH; zeros where none was. The last call's
            is not in it yet.
        total: Int64 []: how many values saturated in all calls but the last.
        amax_P: Int32 [P]: bits of the largest absolute values of parts of the last call.
        saturated_P: Int32 [P]: how many values of each part of it saturated.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.amaxes = torch.empty(0)
        self.total = torch.empty(0)
        self.amax_P = torch.empty(0)
        self.saturated_P = torch.empty(0)

    def is_empty(self, device: torch.device) -> bool:
        """Whether no call was on this device."""
        return not self.calls or self.amaxes.device != device

    @property
    def slot(self) -> int:
        """Where the last call's largest value goes."""
        return (self.calls - 1) % LENGTH

    def amax(self) -> torch.Tensor:
        """Float32 []: the largest finite value of the last LENGTH calls; on the device."""
        return self._settled()[0].amax()

    def saturated(self) -> torch.Tensor:
        """Int64 []: how many values saturated; on the device."""
        return self._settled()[1] if self.calls else torch.zeros((), dtype=torch.int64)

    def settle(self) -> None:
        """Take the last call into the ring and the total; `record` must follow."""
        self.amaxes, self.total = self._settled()

    def record(self, amax_P: torch.Tensor, saturated_P: torch.Tensor) -> None:
        """Add a call, after the one before it was settled."""
        if self.is_empty(amax_P.device):
            self.calls = 0
            self.amaxes = torch.zeros(LENGTH, device=amax_P.device)
            self.total = torch.zeros((), dtype=torch.int64, device=amax_P.device)
        self.calls += 1
        self.amax_P, self.saturated_P = amax_P, saturated_P

    def _settled(self) -> tuple[torch.Tensor, torch.Tensor]:
        amax = self.amax_P.amax().view(torch.float32)
        is_here = torch.arange(LENGTH, device=amax.device) == self.slot
        return torch.where(is_here & amax.isfinite(), amax, self.amaxes), self.total + self.saturated_P.sum()


@dataclass(frozen=True, slots=True)
class Histories:
    """Of linears of one input: of that, and of the gradients of their outputs."""

    x: History = field(default_factory=History)
    gradients: History = field(default_factory=History)

    def saturated(self) -> int:
        """How many values saturated in both; waits for the device."""
        return int(self.x.saturated()) + int(self.gradients.saturated())


def delayed_scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale for the next values where the last ones reached `amax`, float32 of any shape, finite; 1 where that is 0."""
    return torch.where(amax == 0, 1.0, scale_of(amax, dtype) * 2.0**MARGIN)
