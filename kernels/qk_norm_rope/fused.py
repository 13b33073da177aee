"""`qk_norm_rope` in Triton: one launch for q and k forward, one backward.

Bytes per call are the floor: forward reads and writes q and k once, backward reads the gradient and x and writes the gradient of
x; one float a head for rstd, 4 P D bytes for the partial weight gradients of P programs. Forward, a program serves one token and
several of its heads, as in rope. Backward, a persistent grid walks such tiles, those of q and those of k apart, so that each
program sums up the gradient of one weight: partial sums are added in a fixed order, without atomics.
Shapes and letters as in eager.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from automodel_accel.kernels.launch import cdiv, next_power_of_2, persistent_programs
from automodel_accel.kernels.qk_norm_rope.heads import backward_heads, forward_heads
from automodel_accel.kernels.rms_norm.fused import sum_partials
from automodel_accel.kernels.rope.fused import heads_of_a_program, load_table, table_strides, unit_stride

BACKWARD_ELEMENTS = 4096  # of a tile, as in rope: 2048 would spill in float32 on an A100
PROGRAMS_PER_PROCESSOR = 8
WARPS = 4


@triton.jit
def qk_norm_rope_fwd_kernel(
    Q,
    K,
    Q_OUT,
    K_OUT,
    Q_WEIGHT,
    K_WEIGHT,
    Q_RSTD,
    K_RSTD,
    COS,
    SIN,
    n_tokens,
    n_q_heads,
    n_k_heads,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_q_out_b,
    stride_q_out_s,
    stride_q_out_h,
    stride_k_out_b,
    stride_k_out_s,
    stride_k_out_h,
    stride_cos_b,
    stride_cos_s,
    stride_cos_r,
    stride_sin_b,
    stride_sin_s,
    stride_sin_r,
    eps,
    offset,
    Q_PROGRAMS: tl.constexpr,
    INVERSE: tl.constexpr,
    PER_PAIR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IN_INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    b = token // n_tokens
    s = token % n_tokens
    part = tl.program_id(1)
    cos_1, cos_2 = load_table(
        COS + b * stride_cos_b + s * stride_cos_s, stride_cos_r, PER_PAIR, INTERLEAVED, HALF, BLOCK
    )
    sin_1, sin_2 = load_table(
        SIN + b * stride_sin_b + s * stride_sin_s, stride_sin_r, PER_PAIR, INTERLEAVED, HALF, BLOCK
    )
    if INVERSE:
        sin_1 = -sin_1
        sin_2 = -sin_2
    if part < Q_PROGRAMS:
        forward_heads(
            Q + b * stride_qb + s * stride_qs,
            Q_OUT + b * stride_q_out_b + s * stride_q_out_s,
            Q_WEIGHT,
            Q_RSTD + token * n_q_heads,
            part * Q_HEADS,
            n_q_heads,
            stride_qh,
            stride_q_out_h,
            cos_1,
            cos_2,
            sin_1,
            sin_2,
            eps,
            offset,
            IN_INTERLEAVED,
            INTERLEAVED,
            HALF,
            REST,
            BLOCK,
            BLOCK_REST,
            Q_HEADS,
        )
    else:
        forward_heads(
            K + b * stride_kb + s * stride_ks,
            K_OUT + b * stride_k_out_b + s * stride_k_out_s,
            K_WEIGHT,
            K_RSTD + token * n_k_heads,
            (part - Q_PROGRAMS) * K_HEADS,
            n_k_heads,
            stride_kh,
            stride_k_out_h,
            cos_1,
            cos_2,
            sin_1,
            sin_2,
            eps,
            offset,
            IN_INTERLEAVED,
            INTERLEAVED,
            HALF,
            REST,
            BLOCK,
            BLOCK_REST,
            K_HEADS,
        )


@triton.jit
def qk_norm_rope_bwd_kernel(
    DQ_OUT,
    DK_OUT,
    Q,
    K,
    Q_WEIGHT,
    K_WEIGHT,
    Q_RSTD,
    K_RSTD,
    DQ,
    DK,
    DW_PARTIAL,
    COS,
    SIN,
    n_all_tokens,
    n_tokens,
    n_q_heads,
    n_k_heads,
    stride_dqb,
    stride_dqs,
    stride_dqh,
    stride_dkb,
    stride_dks,
    stride_dkh,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_cos_b,
    stride_cos_s,
    stride_cos_r,
    stride_sin_b,
    stride_sin_s,
    stride_sin_r,
    offset,
    Q_PROGRAMS: tl.constexpr,
    K_PROGRAMS: tl.constexpr,
    Q_GROUPS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    INVERSE: tl.constexpr,
    PER_PAIR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IN_INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
):
    program = tl.program_id(0)
    DW_PARTIAL += program * (2 * HALF + REST)
    if program < Q_PROGRAMS:
        backward_heads(
            DQ_OUT,
            Q,
            Q_WEIGHT,
            Q_RSTD,
            DQ,
            DW_PARTIAL,
            COS,
            SIN,
            program,
            n_all_tokens,
            n_tokens,
            n_q_heads,
            stride_dqb,
            stride_dqs,
            stride_dqh,
            stride_qb,
            stride_qs,
            stride_qh,
            stride_cos_b,
            stride_cos_s,
            stride_cos_r,
            stride_sin_b,
            stride_sin_s,
            stride_sin_r,
            offset,
            Q_PROGRAMS,
            Q_GROUPS,
            INVERSE,
            PER_PAIR,
            INTERLEAVED,
            IN_INTERLEAVED,
            HALF,
            REST,
            BLOCK,
            BLOCK_REST,
            Q_HEADS,
        )
    else:
        backward_heads(
            DK_OUT,
            K,
            K_WEIGHT,
            K_RSTD,
            DK,
            DW_PARTIAL,
            COS,
            SIN,
            program - Q_PROGRAMS,
            n_all_tokens,
            n_tokens,
            n_k_heads,
            stride_dkb,
            stride_dks,
            stride_dkh,
            stride_kb,
            stride_ks,
            stride_kh,
            stride_cos_b,
            stride_cos_s,
            stride_cos_r,
            stride_sin_b,
            stride_sin_s,
            stride_sin_r,
            offset,
            K_PROGRAMS,
            K_GROUPS,
            INVERSE,
            PER_PAIR,
            INTERLEAVED,
            IN_INTERLEAVED,
            HALF,
            REST,
            BLOCK,
            BLOCK_REST,
            K_HEADS,
        )


def forward(
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    rstds: Sequence[torch.Tensor],
    cos_BSR: torch.Tensor,
    sin_BSR: torch.Tensor,
    eps: float,
    offset: float,
    layout: str,
    per_pair: bool,
    inverse: bool,
) -> None:
    """Write what each input becomes into its output, and into its rstd."""
    q, k = map(unit_stride, inputs)
    form = _form(q, cos_BSR, layout, per_pair, inverse)
    n_tokens, n_q_heads, n_k_heads = q.shape[1], q.shape[2], k.shape[2]
    half_head = next_power_of_2(q.shape[3]) // 2
    q_heads, k_heads = (heads_of_a_program(n_heads, half_head) for n_heads in (n_q_heads, n_k_heads))
    q_programs = cdiv(n_q_heads, q_heads)
    grid = (q.shape[0] * n_tokens, q_programs + cdiv(n_k_heads, k_heads))
    if grid[0] * grid[1] == 0:
        return
    qk_norm_rope_fwd_kernel[grid](
        q,
        k,
        *outputs,
        *(weight.contiguous() for weight in weights),
        *rstds,
        cos_BSR,
        sin_BSR,
        n_tokens,
        n_q_heads,
        n_k_heads,
        *q.stride()[:3],
        *k.stride()[:3],
        *outputs[0].stride()[:3],
        *outputs[1].stride()[:3],
        *table_strides(cos_BSR),
        *table_strides(sin_BSR),
        eps,
        offset,
        Q_PROGRAMS=q_programs,
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        num_warps=WARPS,
        enable_fp_fusion=True,
        **form,
    )


def backward(
    grad_outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    rstds: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    cos_BSR: torch.Tensor,
    sin_BSR: torch.Tensor,
    offset: float,
    layout: str,
    per_pair: bool,
    inverse: bool,
) -> list[torch.Tensor]:
    """Write the gradient of each input into `grads`, contiguous; return those of the weights, in their dtype."""
    q, k = map(unit_stride, inputs)
    dq_out, dk_out = map(unit_stride, grad_outputs)
    form = _form(q, cos_BSR, layout, per_pair, inverse)
    n_all_tokens, n_q_heads, n_k_heads = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    half_head = next_power_of_2(q.shape[3]) // 2
    heads = [heads_of_a_program(n, half_head, BACKWARD_ELEMENTS) for n in (n_q_heads, n_k_heads)]
    groups = [cdiv(n, h) for n, h in zip((n_q_heads, n_k_heads), heads, strict=True)]
    if n_all_tokens * sum(groups) == 0:
        return [torch.zeros_like(weight) for weight in weights]
    programs = _split(persistent_programs(q.device, PROGRAMS_PER_PROCESSOR), n_all_tokens, groups)
    partial_PD = torch.empty(sum(programs), q.shape[3], dtype=torch.float32, device=q.device)
    qk_norm_rope_bwd_kernel[(sum(programs),)](
        dq_out,
        dk_out,
        q,
        k,
        *(weight.contiguous() for weight in weights),
        *rstds,
        *grads,
        partial_PD,
        cos_BSR,
        sin_BSR,
        n_all_tokens,
        q.shape[1],
        n_q_heads,
        n_k_heads,
        *dq_out.stride()[:3],
        *dk_out.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        *table_strides(cos_BSR),
        *table_strides(sin_BSR),
        offset,
        Q_PROGRAMS=programs[0],
        K_PROGRAMS=programs[1],
        Q_GROUPS=groups[0],
        K_GROUPS=groups[1],
        Q_HEADS=heads[0],
        K_HEADS=heads[1],
        num_warps=WARPS,
        enable_fp_fusion=True,
        **form,
    )
    sides = partial_PD[: programs[0]], partial_PD[programs[0] :]
    return [sum_partials(partial, weight.dtype) for partial, weight in zip(sides, weights, strict=True)]


def _form(q: torch.Tensor, cos_BSR: torch.Tensor, layout: str, per_pair: bool, inverse: bool) -> dict[str, int]:
    half = cos_BSR.shape[-1] // (1 if per_pair else 2)
    rest = q.shape[3] - 2 * half
    return {
        "INVERSE": inverse,
        "PER_PAIR": per_pair,
        "INTERLEAVED": layout == "interleaved",
        "IN_INTERLEAVED": layout != "half",
        "HALF": half,
        "REST": rest,
        "BLOCK": next_power_of_2(half),
        "BLOCK_REST": next_power_of_2(max(rest, 1)),
    }


def _split(programs: int, n_tokens: int, groups: list[int]) -> list[int]:
    """Programs for q and for k, in proportion to their tiles; one at least, for each writes one sum."""
    q_share = programs * groups[0] // sum(groups)
    wanted = q_share, programs - q_share
    return [max(1, min(share, n_tokens * tiles)) for share, tiles in zip(wanted, groups, strict=True)]
