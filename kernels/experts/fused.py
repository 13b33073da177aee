"""What `experts` does between and after its matrix products, in Triton. Shapes as in eager.py.

Each kernel is one pass: `combine` gathers the rows of a token, weighs and adds them, reading [S, D] and writing [T, D];
`differentiate` reads the gradient and inner and writes both gradients and the weighted activations. Both take the rows where
they lie, by index, so that no permuted copy is made. Every sum has one owner: no atomics.
"""

import torch
import triton
import triton.language as tl

from automodel_accel.kernels.activation import fused as plain
from automodel_accel.kernels.activation.fused import activate as activate_and_slope
from automodel_accel.kernels.activation.fused import differentiate as differentiate_plain
from automodel_accel.kernels.gated_linear import fused as gated
from automodel_accel.kernels.gated_linear.reference import LAYOUTS, split
from automodel_accel.kernels.launch import cdiv

BLOCK = 1024
WARPS = 4
GROUP_BLOCK, GROUP_ROWS = 128, 32  # columns and rows of a tile that `sum_rows` adds up


@triton.jit
def combine_kernel(
    Y,
    WEIGHTS,
    BIAS,
    EXPERT,
    INVERSE,
    OUT,
    n_cols,
    tiles_per_row,
    top_k,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    token = (tile // tiles_per_row).to(tl.int64)  # offsets pass 2^31 elements
    cols = (tile % tiles_per_row) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < n_cols
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.range(0, top_k):
        slot = token * top_k + k
        row = tl.load(INVERSE + slot)
        y = tl.load(Y + row * n_cols + cols, mask=in_row, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(BIAS + tl.load(EXPERT + slot) * n_cols + cols, mask=in_row, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            y *= tl.load(WEIGHTS + slot).to(tl.float32)
        total += y
    tl.store(OUT + token * n_cols + cols, total.to(OUT.dtype.element_ty), mask=in_row)


@triton.jit
def differentiate_kernel(
    DACTIVATED,
    GATE,
    UP,
    WEIGHTS,
    ORDER,
    DGATE,
    DUP,
    WEIGHTED,
    DWEIGHTS,
    n_cols,
    stride_inner,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    slot = tl.load(ORDER + row)
    weight = tl.load(WEIGHTS + slot).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        in_row = cols < n_cols
        du = tl.load(DACTIVATED + row * n_cols + cols, mask=in_row, other=0.0).to(tl.float32)
        gate = tl.load(GATE + row * stride_inner + cols, mask=in_row, other=0.0).to(tl.float32)
        if LAYOUT == "none":
            activated = gate
            dgate = du * weight
        elif LAYOUT == "plain":
            activated, _ = activate_and_slope(gate, ACTIVATION)
            activated = activated.to(GATE.dtype.element_ty).to(tl.float32)
            dgate = differentiate_plain(du * weight, gate, ACTIVATION)
        else:
            up = tl.load(UP + row * stride_inner + cols, mask=in_row, other=0.0).to(tl.float32)
            act, slope = activate_and_slope(gate, ACTIVATION)
            act = act.to(GATE.dtype.element_ty).to(tl.float32)
            activated = (act * up).to(GATE.dtype.element_ty).to(tl.float32)
            dgate = du * weight * up * slope
            dup = du * weight * act
            tl.store(DUP + row * stride_inner + cols, dup.to(DUP.dtype.element_ty), mask=in_row)
        dweight += du * activated
        tl.store(DGATE + row * stride_inner + cols, dgate.to(DGATE.dtype.element_ty), mask=in_row)
        weighted = activated * weight
        tl.store(WEIGHTED + row * n_cols + cols, weighted.to(WEIGHTED.dtype.element_ty), mask=in_row)
    tl.store(DWEIGHTS + slot, tl.sum(dweight))


@triton.jit
def sum_rows_kernel(X, OFFSETS, SUMS, n_cols, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    group = tl.program_id(0)
    start = tl.load(OFFSETS + group - 1, mask=group > 0, other=0)
    end = tl.load(OFFSETS + group)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < n_cols
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & in_row[None, :]
        x = tl.load(X + rows.to(tl.int64)[:, None] * n_cols + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x, 0)
    tl.store(SUMS + group.to(tl.int64) * n_cols + cols, total.to(SUMS.dtype.element_ty), mask=in_row)


def activate(inner: torch.Tensor, activation: str, layout: str) -> torch.Tensor:
    """The activated rows, [S, F]."""
    if layout in LAYOUTS:
        return gated.forward(*split(inner, layout), activation)
    return plain.forward(inner, activation) if layout == "plain" else inner


def combine(
    y_SD: torch.Tensor,
    weights_TK: torch.Tensor | None,
    bias_ED: torch.Tensor | None,
    expert: torch.Tensor,
    inverse: torch.Tensor,
    n_tokens: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The sum over the slots of each token of weight * (y + bias), [T, D]; weights of one where none are given."""
    out_TD = y_SD.new_empty(n_tokens, y_SD.shape[1], dtype=dtype)
    if out_TD.numel() == 0:
        return out_TD
    tiles_per_row = cdiv(y_SD.shape[1], BLOCK)
    combine_kernel[(n_tokens * tiles_per_row,)](
        y_SD,
        y_SD if weights_TK is None else weights_TK,
        y_SD if bias_ED is None else bias_ED.contiguous(),
        expert,
        inverse,
        out_TD,
        y_SD.shape[1],
        tiles_per_row,
        inverse.shape[0] // n_tokens,
        HAS_WEIGHTS=weights_TK is not None,
        HAS_BIAS=bias_ED is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return out_TD


def differentiate(
    grad_activated: torch.Tensor,
    inner: torch.Tensor,
    weights_TK: torch.Tensor,
    order: torch.Tensor,
    activation: str,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the gradient of the rows before their weights: gradients of inner, activated rows times weight, gradients of the weights [T K]."""
    grad_inner, weighted = torch.empty_like(inner), torch.empty_like(grad_activated)
    grad_weights = inner.new_empty(order.shape, dtype=torch.float32)
    gate, up = split(inner, layout) if layout in LAYOUTS else (inner, inner)
    grad_gate, grad_up = split(grad_inner, layout) if layout in LAYOUTS else (grad_inner, grad_inner)
    if weighted.numel() == 0:
        return grad_inner, weighted, grad_weights.zero_()
    differentiate_kernel[(order.shape[0],)](
        grad_activated,
        gate,
        up,
        weights_TK,
        order,
        grad_gate,
        grad_up,
        weighted,
        grad_weights,
        grad_activated.shape[1],
        inner.stride(0),
        ACTIVATION=activation,
        LAYOUT=layout,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return grad_inner, weighted, grad_weights


def sum_rows(x_SN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """The sum of the rows of each group, [E, N]."""
    sums_EN = x_SN.new_empty(offsets_E.shape[0], x_SN.shape[1])
    sum_rows_kernel[(offsets_E.shape[0], cdiv(x_SN.shape[1], GROUP_BLOCK))](
        x_SN,
        offsets_E,
        sums_EN,
        x_SN.shape[1],
        BLOCK=GROUP_BLOCK,
        ROWS=GROUP_ROWS,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return sums_EN
