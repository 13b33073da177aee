"""Low-rank adapters of one input in Triton: x is read once for all of them, and masks cost no memory and no launch.

    project         p_i = f_i (m_i * x) A_i^T               1 pass over x [N, H]
    grad_a          dA_i = f_i dp_i^T (m_i * x)             1 pass over x
    add_grad_input  dx += sum over i of m_i * (f_i dp_i A_i)        1 pass over dx, read and written

with dp_i = dy_i B_i. Everything else is of rank size. FLOPs as in kernels/lora. On the way `project` may write p beside x and B beside
the weights, for one GEMM of [x | p] and [W | B] (extension.py). A mask is drawn where it is needed, by the counter-based generator
Philox from a seed, the number of the element and that of the adapter, so that it is the same in each kernel whatever its tiles are;
PEFT's distribution, not its bits. Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.

Shapes: x and dx are [N, H], A [R, H], B [F, R]; p and dp hold the adapters side by side, [N, C], each in columns of its own: `Place`.
A launch serves up to three adapters, each by one of the four words that Philox gives an element.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from automodel_accel.kernels.launch import cdiv, next_power_of_2
from automodel_accel.kernels.lora import Form
from automodel_accel.kernels.lora.extension import padded
from automodel_accel.kernels.lora.products_fused import (
    add_grad_input_kernel,
    grad_a_kernel,
    mask_kernel,
    project_kernel,
)

TOGETHER = 3  # adapters in one launch
TILE = 64  # columns of x
NARROW = 32  # of grad_a, whose programs each walk all rows: enough of them to fill a GPU
COPIED_ROWS = 64  # of B, by a program
WARPS = 4


@dataclass(frozen=True, slots=True)
class Placed:
    """An adapter of a call.

    Attributes:
        number: Of the linear in its call.
        lot: Its own number among the adapters of the call, by which its masks are drawn.
        a_RH, b_FR: Its parameters, of any floating point dtype.
        form: How it is applied.
        start: Its first column in p.
        wide: Its weight with the columns beside it, [F, H + C], of which B's are written by `project`; or None.
    """

    number: int
    lot: int
    a_RH: torch.Tensor
    b_FR: torch.Tensor
    form: Form
    start: int
    wide: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.a_RH.shape[0]


Group = Sequence[Placed]


def draw_seed(device: torch.device) -> int:
    """Of the masks of one call, by the default generator of the device, which moves on; a GPU is not waited for."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        offset = generator.get_offset()
        generator.set_offset(offset + 4)
        drawn = hash((generator.initial_seed(), offset))
    else:
        drawn = int(torch.randint(1 << 62, ()))
    # always 64 bits and odd, so that there is one compiled kernel for all
    return (drawn & ((1 << 61) - 1)) | 1 << 62 | 1


def project(x_NH: torch.Tensor, group: Group, columns: int, seed: int, beside: bool) -> torch.Tensor:
    """p of all adapters, [N, C] in x's dtype, in new memory.

    Args:
        x_NH: Rows of unit stride.
        group: The adapters; where they have a wide weight, B is written into it.
        columns: C.
        seed: Of the masks.
        beside: Whether p is written beside the rows of x too.
    """
    p_NC = x_NH.new_empty(x_NH.shape[0], columns)
    for chunk, slots, shared in _launches(group):
        tile, warps = _tile(shared, x_NH.dtype)
        row_blocks = cdiv(x_NH.shape[0], tile["ROWS"])
        wide = next((one.wide for one in slots if one is not None), None)
        longest = max(one.b_FR.shape[0] for one in slots if one is not None)
        copy_blocks = 0 if wide is None else cdiv(longest, COPIED_ROWS)
        project_kernel[(row_blocks + len(slots) * copy_blocks,)](
            x_NH,
            p_NC,
            *_each(slots, lambda one: one.a_RH, x_NH),
            *_each(slots, lambda one: one.b_FR, x_NH),
            *_each(slots, lambda one: x_NH if one.wide is None else one.wide, x_NH),
            *_numbers(slots),
            *_each(slots, lambda one: padded(one.rank), 0),
            *_factors(slots),
            *_each(slots, lambda one: one.b_FR.shape[0], 0),
            *x_NH.shape,
            x_NH.stride(0),
            p_NC.stride(0),
            0 if wide is None else wide.stride(0),
            row_blocks,
            max(copy_blocks, 1),
            seed,
            FIRST=chunk,
            BESIDE=beside,
            COPIED_ROWS=COPIED_ROWS,
            PRECISION=_precision(x_NH.dtype),
            num_warps=warps,
            enable_fp_fusion=True,
            **shared,
            **tile,
        )
    return p_NC


def grad_a(x_NH: torch.Tensor, dp_NC: torch.Tensor, group: Group, seed: int) -> list[torch.Tensor]:
    """dA [R, H] of each adapter, in A's dtype; `dp_NC` may have a row stride."""
    grads = [torch.empty_like(one.a_RH, memory_format=torch.contiguous_format) for one in group]
    of = {one.number: grad for one, grad in zip(group, grads, strict=True)}
    for chunk, slots, shared in _launches(group):
        tile, warps = _tall_tile(shared, dp_NC.dtype)
        grad_a_kernel[(cdiv(x_NH.shape[1], NARROW),)](
            x_NH,
            dp_NC,
            *_each(slots, lambda one: of[one.number], x_NH),
            *_numbers(slots),
            *_factors(slots),
            *x_NH.shape,
            x_NH.stride(0),
            dp_NC.stride(0),
            seed,
            FIRST=chunk,
            PRECISION=_precision(dp_NC.dtype),
            num_warps=warps,
            enable_fp_fusion=True,
            **shared,
            **tile,
        )
    return grads


def add_grad_input(dx_NH: torch.Tensor, dp_NC: torch.Tensor, group: Group, seed: int) -> None:
    """Add the adapters' part to `dx_NH`, which may have a row stride, as `dp_NC` may."""
    for chunk, slots, shared in _launches(group):
        tile, warps = _flat_tile(shared, dp_NC.dtype)
        add_grad_input_kernel[(cdiv(dx_NH.shape[0], tile["ROWS"]), cdiv(dx_NH.shape[1], tile["COLS"]))](
            dx_NH,
            dp_NC,
            *_each(slots, lambda one: one.a_RH, dx_NH),
            *_numbers(slots),
            *_factors(slots),
            *dx_NH.shape,
            dx_NH.stride(0),
            dp_NC.stride(0),
            seed,
            FIRST=chunk,
            PRECISION=_precision(dp_NC.dtype),
            num_warps=warps,
            enable_fp_fusion=True,
            **shared,
            **tile,
        )


def mask(x: torch.Tensor, lot: int, dropout: float, seed: int) -> torch.Tensor:
    """m of the adapter of that lot, 0 or 1, of x's shape and dtype: what the kernels draw and never write."""
    drawn = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n_rows, n_cols = x.shape[:-1].numel(), x.shape[-1]
    mask_kernel[(cdiv(n_rows, TILE), cdiv(n_cols, TILE))](
        drawn,
        n_rows,
        n_cols,
        dropout,
        seed,
        WORD=lot % TOGETHER,
        FIRST=lot // TOGETHER,
        ROWS=TILE,
        COLS=TILE,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return drawn


def _launches(group: Group) -> Iterator[tuple[int, list[Placed | None], dict[str, Any]]]:
    """The adapters by launches, each at the place of its word, and what is constant in a launch."""
    for chunk in sorted({one.lot // TOGETHER for one in group}):
        own = {one.lot % TOGETHER: one for one in group if one.lot // TOGETHER == chunk}
        slots = [own.get(word) for word in range(max(own) + 1)]
        yield (
            chunk,
            slots,
            {
                "COUNT": len(slots),
                "DROPOUT": any(one.form.dropout > 0 for one in own.values()),
                "R": max(16, *(next_power_of_2(one.rank) for one in own.values())),
            },
        )


def _each(slots: Sequence[Placed | None], read: Any, absent: Any) -> list[Any]:
    """A number or a tensor of each adapter; `absent`, which is not touched, where there is none."""
    found = [absent if one is None else read(one) for one in slots]
    return found + [absent] * (TOGETHER - len(found))


def _numbers(slots: Sequence[Placed | None]) -> list[int]:
    """The ranks and the first columns."""
    return _each(slots, lambda one: one.rank, 0) + _each(slots, lambda one: one.start, 0)


def _factors(slots: Sequence[Placed | None]) -> list[float]:
    """The factors and the probabilities."""
    return _each(slots, lambda one: one.form.factor, 0.0) + _each(slots, lambda one: one.form.dropout, 0.0)


def _tile(shared: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Rows, columns and stages, and warps: so that three sums stay in registers and the tiles of three A in shared memory."""
    rank, wide = shared["R"], dtype is torch.float32
    rows = 16 if wide else 32 if shared["DROPOUT"] or rank >= 64 else 64
    cols = TILE if rank <= 32 else TILE // 2 if rank <= 128 else TILE // 4
    warps = 2 * WARPS if wide or rank >= 128 else WARPS
    return {"ROWS": rows, "COLS": cols, "num_stages": 2 if rank >= 64 else 3}, warps


def _tall_tile(shared: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Likewise for sums over the rows."""
    tile, warps = _tile(shared, dtype)
    few = dtype is torch.float32 or shared["R"] > 64 or shared["DROPOUT"]
    return tile | {"ROWS": TILE // 2 if few else TILE, "COLS": NARROW}, warps


def _flat_tile(shared: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Likewise for one product of rank size for each element, with one A after the other."""
    tile, warps = _tile(shared, dtype)
    if shared["R"] >= 128 and dtype is not torch.float32:
        return tile | {"ROWS": 16, "COLS": TILE // 2}, WARPS
    return tile | {"COLS": TILE}, warps


def _precision(dtype: torch.dtype) -> str | None:
    return "ieee" if dtype is torch.float32 else None
