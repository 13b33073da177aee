"""Room beside the rows of an output, for what the adapters of a linear add to its input (kernels/lora): [N, H] in memory of [N, H + room].

Who produces the input of adapted linears leaves the room; the linears' kernel writes there, and one GEMM takes both. So the room is
free only for a tensor that is marked: a slice of somebody's tensor has neighbours too. It is scratch: valid until the next linear
that takes the same tensor.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from automodel_accel.kernels.launch import cdiv

MARK = "_accel_room"  # attribute of the output
ALIGNED = 8  # columns: 16 bytes in bfloat16
STRIDE = 16  # elements: Triton moves 16 bytes at once only where it knows rows to be a multiple of them apart

_here = threading.local()


@contextmanager
def leaving(columns: int) -> Iterator[None]:
    """Inside, operations of this thread leave at least that many columns, a multiple of 8, beside each row of their main output."""
    assert columns % ALIGNED == 0, columns
    before = getattr(_here, "columns", 0)
    _here.columns = columns
    try:
        yield
    finally:
        _here.columns = before


def empty_rows(n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised [N, H], in rows further apart where room is to be left: by at least as many columns as asked for."""
    columns = getattr(_here, "columns", 0)
    if not columns:
        return torch.empty(n_rows, n_cols, dtype=dtype, device=device)
    stride = cdiv(n_cols + columns, STRIDE) * STRIDE
    return torch.empty(n_rows, stride, dtype=dtype, device=device)[:, :n_cols]


def left(columns: int, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """`function(*inputs, **options)` with room beside its output, the first one where there are several, which is marked."""
    if not columns:
        return function(*inputs, **options)
    with leaving(columns):
        output = function(*inputs, **options)
    mark(output[0] if isinstance(output, tuple) else output)
    return output


def mark(output: torch.Tensor) -> None:
    """Note on this very tensor that the columns beside its rows, where there are any, are free."""
    if output.dim() > 1 and output.stride(-2) > output.shape[-1]:
        setattr(output, MARK, True)


def beside(x: torch.Tensor) -> int:
    """Free columns beside each row of this very tensor: 0 where it is not marked, or is a single row, which shows no stride."""
    if not getattr(x, MARK, False):
        return 0
    columns = x.stride(-2) - x.shape[-1]
    whole = x.stride(-1) == 1 and x.shape[:-1].numel() * x.stride(-2) == x.untyped_storage().nbytes() // x.itemsize
    return columns if whole else 0


def extended(x: torch.Tensor, columns: int) -> torch.Tensor:
    """[N, H + columns]: the rows of x and the first columns beside them. To write beside x is not to write to x."""
    stride = x.stride(-2)
    return x.detach().data.as_strided((x.shape[:-1].numel(), x.shape[-1] + columns), (stride, 1), x.storage_offset())
