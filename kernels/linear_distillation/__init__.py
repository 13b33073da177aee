"""linear_distillation: the heads of a student and its teacher and their divergence, in one operation that builds no logits.

    s = scale (hidden @ weight.T + bias)       t = the teacher's      each soft-capped: c tanh(z / c), where it has a cap
    p = softmax(t / T)          q = softmax(s / T)

    loss = T^2 sum over counted tokens, sum over V of p (log p - log q)          ds = T (q - p), times scale (1 - tanh^2)
    dhidden = ds @ weight       dweight = ds.T @ hidden       dbias = sum over tokens of ds

T^2 keeps the size of the gradients whatever the temperature. Tokens are worked off in chunks, as by `linear_cross_entropy`:
beyond inputs and gradients it needs one chunk of logits of each of the two, and the gradients are ready when the loss is. The
teacher gets none. Tokens that do not count are dropped before the first GEMM on a CPU.
Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
"""

from typing import Any, NamedTuple

import torch

from automodel_accel.kernels.linear_cross_entropy.chunks import (
    ROW_ALIGNMENT,
    chunk_rows,
    compute_dtype,
    rows_that_count,
)
from automodel_accel.kernels.linear_cross_entropy.eager import CPU_BLOCK_BYTES, GPU_BLOCK_BYTES


class _Head(NamedTuple):
    """What one model's logits are made of."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    scale: float
    softcap: float | None


def linear_distillation(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    counted: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """The divergence of a student from its teacher, summed over tokens, times temperature^2; logits are never built as a whole.

    Logits are rounded to the dtype of `hidden` (the teacher's to its own) as a linear layer rounds them; all else is float32.

    Args:
        hidden: [N, H] of the student.
        weight: [V, H] in the dtype of `hidden`.
        teacher_hidden: [N, H'], in any floating-point dtype; needs no gradient and gets none.
        teacher_weight: [V, H'] in the dtype of `teacher_hidden`.
        counted: [N], bool: the tokens that count.
        bias: [V] in the dtype of `hidden`.
        teacher_bias: [V] in the dtype of `teacher_hidden`.
        scale: Factor on the student's logits, before the soft-cap.
        softcap: The student's logits become softcap * tanh(logits / softcap); None for none.
        teacher_scale: As `scale`.
        teacher_softcap: As `softcap`.
        temperature: Divides the logits of both.
        workspace_bytes: Memory for a chunk of the student's logits; None: as `linear_cross_entropy` has it.

    Returns:
        0-d, float32 (float64 for float64); differentiable once in hidden, weight and bias.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a temperature that is not above 0.
    """
    student = _Head(hidden, weight, bias, scale, softcap)
    teacher = _Head(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    _check("", student)
    _check("teacher_", teacher)
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"linear_distillation: the student's vocabulary has {weight.shape[0]} classes and the teacher's "
            f"{teacher_weight.shape[0]}; expected one vocabulary: a teacher with the same tokenizer."
        )
    if counted.shape != hidden.shape[:1] or counted.dtype != torch.bool or teacher_hidden.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"linear_distillation: counted is {tuple(counted.shape)} {counted.dtype} and teacher_hidden "
            f"{tuple(teacher_hidden.shape)}; expected ({hidden.shape[0]},) torch.bool, and a row per token of the student."
        )
    if not temperature > 0:
        raise ValueError(f"linear_distillation: temperature is {temperature}, expected a number above 0.")
    return _Distillation.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, weight, bias, counted, scale, softcap, teacher, temperature, workspace_bytes
    )


def _check(name: str, head: _Head) -> None:
    hidden, weight, bias = head.hidden_NH, head.weight_VH, head.bias_V
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and hidden.dtype == weight.dtype
    if not fits or (bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype)):
        raise ValueError(
            f"linear_distillation: {name}hidden is {tuple(hidden.shape)} {hidden.dtype}, {name}weight {tuple(weight.shape)} "
            f"{weight.dtype}, {name}bias {None if bias is None else (tuple(bias.shape), bias.dtype)}; expected [N, H], [V, H] and "
            "[V] in one dtype."
        )
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"linear_distillation: {name}softcap is {head.softcap}, expected a positive number, or None.")


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        counted: torch.Tensor,
        scale: float,
        softcap: float | None,
        teacher: _Head,
        temperature: float,
        workspace_bytes: int | None,
    ) -> torch.Tensor:
        student = _Head(hidden, weight, bias, scale, softcap)
        wanted = ctx.needs_input_grad[:3]
        loss, gradients = _loss_and_gradients(student, teacher, counted, temperature, workspace_bytes, wanted)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        scaled = [None if one is None else (one * grad_output).to(one.dtype) for one in ctx.saved_tensors]
        return (*scaled, *[None] * 6)


def _loss_and_gradients(
    student: _Head,
    teacher: _Head,
    counted_N: torch.Tensor,
    temperature: float,
    workspace_bytes: int | None,
    wanted: tuple[bool, ...],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    hidden_NH, vocab = student.hidden_NH, student.weight_VH.shape[0]
    order = rows_that_count(counted_N)
    n_rows = counted_N.shape[0] if order is None else order.shape[0]
    chunk = chunk_rows(n_rows, vocab, hidden_NH, workspace_bytes)
    loss = hidden_NH.new_zeros((), dtype=compute_dtype(hidden_NH))
    found: list[torch.Tensor | None] = [
        torch.zeros_like(tensor) if want and tensor is not None else None
        for tensor, want in zip(student[:3], wanted, strict=True)
    ]
    d_hidden, d_weight, d_bias = found
    wide_bias = None if d_bias is None else d_bias.to(compute_dtype(d_bias))
    padded = -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT
    memory = [head.hidden_NH.new_empty(chunk, padded)[:, :vocab] for head in (student, teacher)]
    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows)) if order is None else order[start : start + chunk]
        z_CV, added = _differentiate_(student, teacher, rows, counted_N[rows], temperature, memory, any(wanted))
        loss += added
        if d_hidden is not None:
            d_hidden[rows] = z_CV @ student.weight_VH
        if d_weight is not None:
            d_weight.addmm_(z_CV.t(), hidden_NH[rows])
        if wide_bias is not None:
            wide_bias += z_CV.sum(0, dtype=wide_bias.dtype)
    if d_bias is not None and wide_bias is not None:
        d_bias.copy_(wide_bias)
    return loss, found


def _differentiate_(
    student: _Head,
    teacher: _Head,
    rows: torch.Tensor | slice,
    counted_C: torch.Tensor,
    temperature: float,
    memory: list[torch.Tensor],
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the student's logits of one chunk, in place of them, and the loss; in blocks of float32."""
    student_CV, teacher_CV = (_logits(head, rows, into) for head, into in zip((student, teacher), memory, strict=True))
    block_bytes = CPU_BLOCK_BYTES if student_CV.device.type == "cpu" else GPU_BLOCK_BYTES
    size = max(1, block_bytes // (student_CV.shape[1] * compute_dtype(student_CV).itemsize))
    loss = student_CV.new_zeros((), dtype=compute_dtype(student_CV))
    for start in range(0, student_CV.shape[0], size):
        block = slice(start, start + size)
        wide, slope = _capped(student, student_CV[block], needs_slope=wanted)
        log_q = (wide / temperature).log_softmax(-1)
        log_p = (_capped(teacher, teacher_CV[block], needs_slope=False)[0].to(log_q.dtype) / temperature).log_softmax(
            -1
        )
        p = log_p.exp()
        loss_B = (p * (log_p - log_q)).sum(-1)
        loss += temperature**2 * torch.where(counted_C[block], loss_B, 0.0).sum()
        if wanted:
            dz = log_q.exp_().sub_(p).mul_(temperature * student.scale)
            if slope is not None:
                dz.mul_(slope)
            student_CV[block] = dz.masked_fill_(~counted_C[block, None], 0.0)
    return student_CV, loss


def _logits(head: _Head, rows: torch.Tensor | slice, into: torch.Tensor) -> torch.Tensor:
    hidden_CH, weight_HV = head.hidden_NH.detach()[rows], head.weight_VH.detach().t()
    z_CV = into[: hidden_CH.shape[0]]
    if head.bias_V is None:
        return torch.mm(hidden_CH, weight_HV, out=z_CV)
    return torch.addmm(head.bias_V.detach(), hidden_CH, weight_HV, out=z_CV)


def _capped(head: _Head, z_CV: torch.Tensor, needs_slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits as the loss sees them, in the compute dtype, and the slope of the cap."""
    z = z_CV.to(compute_dtype(z_CV)) * head.scale
    if head.softcap is None:
        return z, None
    z = torch.tanh(z / head.softcap)
    return z * head.softcap, 1.0 - z * z if needs_slope else None
