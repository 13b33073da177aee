"""What the producer of a tensor notes of it for a cast to 8 bits: the largest value of each row, or the cast itself.

A producer (a norm, the activation of a gated MLP) holds a row in registers when it writes it. So an FP8 linear behind it need not
read its input for the scale: 2 bytes an element less; with the cast, where only rows are cast (nothing that trains needs the
transpose), another 2. What is noted goes with the very tensor, and is void once that was written to.

    with the maxima: 4 bytes a row more          with the cast: 1 byte an element and 8 a row more

The newest cast of a thread alone is kept: an activation that is saved for backward would keep its own as well.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from automodel_accel.kernels.facts import this_machine
from automodel_accel.kernels.fp8_linear.casts import Cast
from automodel_accel.kernels.fp8_linear.products import is_fast
from automodel_accel.kernels.fp8_linear.scaling import parts_of_largest

NOTE = "_accel_fp8_note"  # attribute of the output

_here = threading.local()


@dataclass(frozen=True, slots=True)
class Wish:
    """What producers are asked for.

    Attributes:
        dtype: The 8-bit format of a cast of the rows, each with its own scale; None: the largest values alone.
    """

    dtype: torch.dtype | None = None


@dataclass(eq=False)
class Note:
    """What is known of a tensor [..., C] of N rows.

    Attributes:
        amax_N: Float32 [N], the largest absolute value of each row: infinite or NaN where the row holds such a value.
        cast: As by `cast_rows([rows], dtype, rowwise=True)`, or None.
        address: Of the tensor's memory.
        version: How often the tensor had been written to.
    """

    amax_N: torch.Tensor
    cast: Cast | None
    address: int
    version: int = 0


@dataclass(frozen=True, slots=True)
class Slots:
    """What a kernel writes beside its output y, all None where nobody asked.

    Attributes:
        amax: Float32 [N] or [N, tiles]: the bits of the largest |y|.
        q: 8-bit [N, C].
        scale: Float32 [N, 1].
        largest: Exponent and mantissa of the largest value of q's format.
    """

    amax: torch.Tensor | None = None
    q: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    largest: tuple[int, int] = (0, 0)

    def pointers(self) -> tuple[torch.Tensor | None, ...]:
        """AMAX (as the int32 of the same bits), Q and SCALE of a kernel."""
        return None if self.amax is None else self.amax.view(torch.int32), self.q, self.scale

    def constants(self) -> dict[str, int]:
        """The constants of a kernel that go with them."""
        exponent, mantissa = self.largest
        return {
            "HAS_AMAX": self.amax is not None,
            "HAS_Q": self.q is not None,
            "EXPONENT": exponent,
            "MANTISSA": mantissa,
        }


NO_SLOTS = Slots()


@contextmanager
def noting(wish: Wish) -> Iterator[None]:
    """Inside, producers of this thread note what is wished for of their main output."""
    before = getattr(_here, "wish", None), getattr(_here, "found", None)
    _here.wish, _here.found = wish, None
    try:
        yield
    finally:
        _here.wish, _here.found = before


def wanted(device: str) -> Wish | None:
    """What a producer on a device type is asked for: no cast where the machine's compiler has none."""
    wish: Wish | None = getattr(_here, "wish", None)
    if wish is None or wish.dtype is None or device == "cpu" or is_fast(this_machine().arch):
        return wish
    return Wish()


def slots(y_NC: torch.Tensor, wish: Wish | None, tiles: int = 1) -> Slots:
    """Memory for what is wished for of an output, where each row is cut into so many tiles: a cast asks for a single one."""
    if wish is None:
        return NO_SLOTS
    n_rows, n_cols = y_NC.shape
    amax = torch.empty((n_rows, tiles) if tiles > 1 else (n_rows,), dtype=torch.float32, device=y_NC.device)
    if wish.dtype is None or tiles > 1:
        return Slots(amax)
    q_NC = torch.empty(n_rows, n_cols, dtype=wish.dtype, device=y_NC.device)
    return Slots(amax, q_NC, amax.new_empty(n_rows, 1), parts_of_largest(wish.dtype))


def leave(y_NC: torch.Tensor, written: Slots) -> None:
    """Hand over what a kernel has written, to be noted on the output that y becomes."""
    if written.amax is None:
        return
    amax_N = written.amax if written.amax.dim() == 1 else written.amax.amax(1)
    cast = None if written.q is None or written.scale is None else Cast(written.q, None, written.scale)
    _here.found = Note(amax_N, cast, y_NC.data_ptr())


def noted(wish: Wish | None, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """`function(*inputs, **options)`; what is wished for is noted on its output, the first one where there are several.

    Where the implementation has no part in this, or under torch.compile, nothing is.
    """
    if wish is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return function(*inputs, **options)
    with noting(wish):
        output = function(*inputs, **options)
        found: Note | None = _here.found
    main = output[0] if isinstance(output, tuple) else output
    if found is not None and found.address == main.data_ptr():
        _attach(main, found)
    return output


def _attach(output: torch.Tensor, note: Note) -> None:
    note.version = output._version
    setattr(output, NOTE, note)
    if note.cast is None:
        return
    newest: weakref.ref[Note] | None = getattr(_here, "newest", None)
    older = None if newest is None else newest()
    if older is not None:
        older.cast = None
    _here.newest = weakref.ref(note)


def _note_of(x: Any) -> Note | None:
    note: Note | None = getattr(x, NOTE, None)
    return note if note is not None and (note.address, note.version) == (x.data_ptr(), x._version) else None


def maxima_of(x: Any) -> torch.Tensor | None:
    """Float32 [N]: the largest absolute value of each row of this very tensor, or None; the `amax_R` of `cast_rows`."""
    note = _note_of(x)
    return None if note is None else note.amax_N


def cast_of(x: Any) -> Cast | None:
    """The cast of the rows of this very tensor, each with its own scale and not transposed; or None."""
    note = _note_of(x)
    return None if note is None else note.cast
