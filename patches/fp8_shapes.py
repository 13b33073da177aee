"""Which linears pay for FP8: the time that 8-bit products save against the time that their casts take, counted for one H100.

    saved = FLOPs (1 / 700 - 1 / 1200) / 1e12                          products forward, of dx and, where the weights train, of dW
    casts = bytes / 3e12                                               of x, of the gradients and, once a step, of the weights

It pays where the casts take less than 0.35 of what is saved. The rates are those that cuBLAS and a copy reach there. Linears of
one input share its cast, so a group is counted as one: k and v on their own never pay, beside q they do.
"""

from dataclasses import dataclass

TOKENS = 8192  # of a step on one GPU
BF16, FP8, BANDWIDTH = 700e12, 1200e12, 3e12  # FLOP/s, FLOP/s, bytes/s
MOST = 0.35  # of what is saved
AMAX, READ, WRITE = 2, 2, 1  # bytes an element of a cast, and 1 more for its transpose


@dataclass(frozen=True, slots=True)
class Worth:
    """What FP8 does to the linears of one input.

    Attributes:
        saved: Seconds a step that the products take less.
        casts: Seconds a step that the casts take.
    """

    saved: float
    casts: float

    @property
    def pays(self) -> bool:
        """Whether the casts take little enough of what is saved."""
        return self.casts < MOST * self.saved

    def __str__(self) -> str:
        return f"{TOKENS} tokens on an H100, counted: products {self.saved * 1e3:.2g} ms less, casts {self.casts * 1e3:.2g} ms"


def worth(in_features: int, out_features: int, trains: bool) -> Worth:
    """Of linears of one input with `out_features` together, whose weights train or are frozen."""
    products = 3 if trains else 2
    flops = products * 2 * TOKENS * in_features * out_features
    cast = AMAX + READ + WRITE
    both = cast + (WRITE if trains else 0)
    moved = both * TOKENS * (in_features + out_features) + (both * in_features * out_features if trains else 0)
    return Worth(flops / BF16 - flops / FP8, moved / BANDWIDTH)
