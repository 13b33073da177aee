"""Grouped matrix products: rows that are sorted by group, each group with a matrix of its own.

On a GPU, bfloat16 goes to `torch.nn.functional.grouped_mm`, which reads the group boundaries on the device. Whatever that does
not take (float32 and float16, widths that are no multiple of 16 bytes) is one product a group, for which a GPU hands the
boundaries to the host once a call, as transformers does there. A CPU has no such cost.
Shapes: offsets [E], the end of each group in the rows, int32.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F


def multiply(x_SI: torch.Tensor, weight_EIO: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """x[s] @ weight[group of s], [S, O]."""
    if _is_native(x_SI, weight_EIO):
        return F.grouped_mm(x_SI, weight_EIO, offs=offsets_E)
    y_SO = x_SI.new_empty(x_SI.shape[0], weight_EIO.shape[2])
    for group, rows in _groups(offsets_E):
        torch.mm(x_SI[rows], weight_EIO[group], out=y_SO[rows])
    return y_SO


def outer(a_SM: torch.Tensor, b_SN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """The sum over the rows of each group of a[s] b[s]^T, [E, M, N]; zero for a group without rows."""
    if _is_native(a_SM, b_SN):
        return F.grouped_mm(a_SM.t(), b_SN, offs=offsets_E)
    sums_EMN = a_SM.new_empty(offsets_E.shape[0], a_SM.shape[1], b_SN.shape[1])
    for group, rows in _groups(offsets_E):
        torch.mm(a_SM[rows].t(), b_SN[rows], out=sums_EMN[group])
    return sums_EMN


def sum_rows(x_SN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """The sum of the rows of each group, [E, N], one group after the other."""
    sums_EN = x_SN.new_empty(offsets_E.shape[0], x_SN.shape[1])
    for group, rows in _groups(offsets_E):
        torch.sum(x_SN[rows], 0, out=sums_EN[group])
    return sums_EN


def _groups(offsets_E: torch.Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for group, end in enumerate(offsets_E.tolist()):
        yield group, slice(start, end)
        start = end


def _is_native(*operands: torch.Tensor) -> bool:
    return all(x.is_cuda and x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in x.shape[1:]) for x in operands)
