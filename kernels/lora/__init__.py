"""Low-rank adapters of linears (LoRA): what they add to the products and to the gradients of `linears` (kernels/linear).

    p = (m * x) A^T       y += f p B^T        f = s / (1 - q): an element of the mask m is 1 with probability 1 - q, else 0
    dp = f dy B           dA = dp^T (m * x)         dB = f dy^T p         dx += m * (dp A)

Of N tokens, H -> F with rank R: 2 N R (H + F) FLOPs forward, twice that backward; the base is 2 N H F. The low-rank product is
written first and the base's GEMM adds to it (beta = 1), so the output is read once by a GEMM, not by kernels of its own;
likewise the gradient of the input. Adapters of one input share the GEMMs with A. p is computed once, and so is dy B.
Dropout is that of PEFT: before A, each adapter with a mask of its own; on a CPU out of the random numbers that torch's own dropout
would take at that place. In backward they are taken once more from the state that the generator was in.
Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.

Saved for backward: p, A, B and x (or its source, see kernels/recompute.py); neither a mask nor a dropped x, whatever q is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from automodel_accel.kernels.lora.extension import Extension

Tensors = Sequence[torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Form:
    """How an adapter is applied.

    Attributes:
        scale: Factor s of the low-rank product.
        dropout: Probability q that an element of x is dropped, 0 to 1.
    """

    scale: float
    dropout: float = 0.0

    @property
    def factor(self) -> float:
        """f: the scale of what is kept of x is part of it, so that it costs no rounding of its own."""
        return self.scale / (1 - self.dropout) if self.dropout < 1 else 0.0


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter of one linear [F, H].

    Attributes:
        a_RH: [R, H].
        b_FR: [F, R], of a's dtype.
        form: How it is applied.
        extension: Columns beside the weight, where it has some.
    """

    a_RH: torch.Tensor
    b_FR: torch.Tensor
    form: Form
    extension: Extension | None = None

    def misfit(self, weight_FH: torch.Tensor) -> str | None:
        """Why this cannot be the adapter of a linear with that weight; None where it can."""
        a, b = self.a_RH, self.b_FR
        expected = f"[R, {weight_FH.shape[1]}] and [{weight_FH.shape[0]}, R] for a weight {tuple(weight_FH.shape)}"
        if (a.dim(), b.dim()) != (2, 2) or (*a.shape[1:], *b.shape[:1]) != (*weight_FH.shape[1:], *weight_FH.shape[:1]):
            return f"an adapter has shapes {tuple(a.shape)} and {tuple(b.shape)}, expected {expected}"
        if a.shape[0] != b.shape[1] or a.dtype != b.dtype:
            return f"an adapter's A is {tuple(a.shape)} {a.dtype} and its B {tuple(b.shape)} {b.dtype}; expected one rank and dtype"
        if not 0 <= self.form.dropout <= 1:
            return f"an adapter has dropout {self.form.dropout}, expected 0 to 1"
        return None


Forms = Sequence[Form | None]


def cast(tensors: Tensors, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """All of them in one dtype."""
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def masks_are_torchs(device: torch.device) -> bool:
    """Whether `draw_mask` gives the masks that torch's own dropout draws there; on a GPU that is a kernel with numbers of its own."""
    return device.type == "cpu"


def draw_mask(x: torch.Tensor, probability: float) -> torch.Tensor:
    """1 where an element of x is kept, else 0, by the next random numbers of x's device."""
    if x.numel() == 0 or probability in (0, 1):  # torch draws nothing then
        return torch.full(x.shape, 1 - probability, dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - probability)


def generator_state(device: torch.device) -> torch.Tensor:
    """State of the device's default generator: 16 bytes for a GPU, which is not waited for, 5 kB for a CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def generator_at(state: torch.Tensor, device: torch.device) -> Iterator[None]:
    """Inside, the device's random numbers are those that followed `state`; afterwards it goes on as if nothing had been drawn."""
    before = generator_state(device)
    _set_state(state, device)
    try:
        yield
    finally:
        _set_state(before, device)


def _set_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
