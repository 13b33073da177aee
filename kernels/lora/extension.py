"""Columns beside a frozen weight for the B of its adapter, so that one GEMM computes both products.

    [x | p] [W | B]^T = x W^T + p B^T               dy [W | B] = [dy W | dy B]

Without them the low-rank product is a pass of its own over the output, which the GEMM then reads: 2 passes over [N, F] more.
The linears of one input share the columns, in which each has its own place, the others' being zero there: p holds all of them.
The weight stays the same parameter with the same values; its rows lie C elements further apart. B stays where it is, and is copied
at each forward (kernels/lora/fused.py): optimizers write parameters in ways that leave no trace to notice.
What is not finite in one adapter reaches the other outputs of the input too, for zero times that is not a number.
Cost: C / H of the weight's memory and of the GEMM's FLOPs; 1.2 % for three adapters of rank 16 at H = 4096.

Shapes: W is [F, H], the wide weight [F, H + C].
"""

import weakref
from typing import Any

import torch
from torch import nn


def padded(rank: int) -> int:
    """Columns of p for an adapter: rows of p are then 16-byte aligned in 2-byte dtypes."""
    return -(-rank // 8) * 8


class Extension:
    """The columns beside one weight.

    Attributes:
        columns: C, of all linears of the input together.
        start: The first one of this linear.
        filled: Which B was copied there last: its address and how often it had been written to.
    """

    def __init__(self, columns: int, start: int, weight: nn.Parameter) -> None:
        self.columns, self.start = columns, start
        self.filled: Any = None
        self._weight = weakref.ref(weight)
        self._address = weight.untyped_storage().data_ptr()

    def wide(self, weight: torch.Tensor) -> torch.Tensor | None:
        """[F, H + C] that the weight is the first columns of; None where it no longer is: moved, replaced, offloaded.

        It is no view of the weight for autograd: what is written beside the weight is no change of it.
        """
        rows, cols = weight.shape
        width = cols + self.columns
        storage = weight.untyped_storage()
        if (
            weight.stride() != (width, 1)
            or storage.data_ptr() != self._address
            or storage.nbytes() != rows * width * weight.itemsize
        ):
            return None
        return weight.detach().data.as_strided((rows, width), (width, 1), 0)

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether this is the very parameter: FSDP2 computes with others, which it manages."""
        return self._weight() is weight


def can_extend(weight: torch.Tensor) -> bool:
    """Whether the weight is a frozen parameter that has its memory for itself."""
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and not weight.is_meta
        and weight.is_contiguous()
        and weight.storage_offset() == 0
        and weight.untyped_storage().nbytes() == weight.numel() * weight.itemsize
    )


def extend(weight: nn.Parameter, columns: int, start: int) -> Extension:
    """Move the weight's values to memory with `columns` zeros beside each row; see `can_extend`."""
    rows, cols = weight.shape
    wide = weight.new_zeros(rows, cols + columns)
    wide[:, :cols] = weight.detach()
    weight.data = wide[:, :cols]
    return Extension(columns, start, weight)


def contract(weight: torch.Tensor) -> None:
    """Move the weight's values back to memory without gaps."""
    weight.data = weight.detach().clone(memory_format=torch.contiguous_format)
