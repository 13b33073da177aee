"""The definition of `linear_distillation`, in plain differentiable PyTorch."""

import torch
import torch.nn.functional as F


def linear_distillation(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    counted: torch.Tensor,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Heads of student and teacher, and their divergence, in float32; see `automodel_accel.kernels.linear_distillation`."""
    student = _log_probabilities(hidden, weight, bias, scale, softcap, temperature)
    teacher = _log_probabilities(
        teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap, temperature
    )
    loss_N = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * torch.where(counted, loss_N, 0.0).sum()


def _log_probabilities(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1)
