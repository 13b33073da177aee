"""How the tokens of a row lie on the ranks of the context axis: two pieces each, one from the front and one from the back.

Under a causal mask a late token sees more than an early one. With 2n pieces for n ranks, rank r holds the pieces r and 2n - 1 - r,
and so every rank the same work. Source: Brandon et al., "Striped Attention", 2023, for the imbalance; the order is that of
Llama 3 ("The Llama 3 Herd of Models", 2024, section 3.3.2).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from automodel_accel.kernels.collectives import gather_to


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one batch on the context ranks.

    Attributes:
        group: The ranks.
        size: Their number.
        rank: This one.
        tokens: The length of the rows, before they are filled up to a multiple of two pieces a rank.
    """

    group: Any
    size: int
    rank: int
    tokens: int

    @property
    def piece(self) -> int:
        """Tokens of a piece."""
        return -(-self.tokens // (2 * self.size))

    @property
    def length(self) -> int:
        """Of the rows when they are filled up."""
        return 2 * self.size * self.piece

    @property
    def starts(self) -> tuple[int, int]:
        """Where the two pieces of this rank begin."""
        return self.rank * self.piece, (2 * self.size - 1 - self.rank) * self.piece

    def filled(self, x: torch.Tensor, value: int) -> torch.Tensor:
        """[B, S, ...] -> [B, length, ...]: what comes last no earlier token sees."""
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.length - x.shape[1]), value=value)

    def own(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This rank's two pieces of rows that are filled up."""
        return torch.cat([x.narrow(dim, start, self.piece) for start in self.starts], dim)

    def whole(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The rows of all ranks' pieces `x`; the gradients that the ranks have for a piece are summed."""
        pieces = torch.split(gather_to(x, self.group, dim), self.piece, dim)
        return torch.cat([*pieces[::2], *reversed(pieces[1::2])], dim)
