"""How far what a student says of the next token is from what its teacher says, without logits where the heads have not built them.

Both may give `LazyLogits`, whose hidden states, weights, scales and soft-caps go into one operation; or real logits, of which
chunks of tokens are compared at a time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from automodel_accel.kernels.linear_distillation import linear_distillation
from automodel_accel.patches.head_call import Recipe
from automodel_accel.patches.lazy_logits import LazyLogits, real
from automodel_accel.patches.vocab import vocab_shard

WHY = "divergence from a teacher"  # of logits that are built
CHUNK = 1024  # tokens of real logits that are compared at once


def divergence(student: Any, teacher: Any, counted: torch.Tensor, temperature: float) -> torch.Tensor:
    """The sum over tokens of KL(teacher || student) at `temperature`, times its square.

    Args:
        student: Logits [..., V], lazy or real.
        teacher: Logits of the same tokens; they get no gradient.
        counted: [...], bool: the tokens that count.
        temperature: Divides the logits of both.

    Returns:
        0-dimensional, float32.

    Raises:
        ValueError: the vocabularies or the numbers of tokens differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits are {list(student.shape)} and the teacher's {list(teacher.shape)}; expected a teacher with the same "
            "vocabulary, and the same tokens of both."
        )
    flat = counted.reshape(-1)
    if _is_simple(student) and _is_simple(teacher):
        return _fused(student, teacher, flat, temperature)
    return _of_logits(real(student, WHY), real(teacher, WHY).detach(), flat, temperature)


def _is_simple(logits: Any) -> bool:
    """Whether they wait for the product of one linear, all of whose weight is here."""
    if not isinstance(logits, LazyLogits) or logits._real is not None:
        return False
    call, recipe = logits._call, logits._recipe
    (head, *others) = call.summands
    return not others and call.row is None and head.is_whole and vocab_shard(head.linear) is None and recipe.is_rounded


def _fused(student: LazyLogits, teacher: LazyLogits, counted_N: torch.Tensor, temperature: float) -> torch.Tensor:
    hidden, weight, bias, recipe = _parts(student)
    with torch.no_grad():
        teacher_hidden, teacher_weight, teacher_bias, teacher_recipe = _parts(teacher)
    student._call.counts.count(student._call.counts.fused, "distillation")
    return linear_distillation(
        hidden,
        weight,
        teacher_hidden.detach(),
        teacher_weight.detach(),
        counted_N,
        bias=bias,
        teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        temperature=temperature,
        scale=_scale(recipe),
        softcap=_softcap(recipe),
        teacher_scale=_scale(teacher_recipe),
        teacher_softcap=_softcap(teacher_recipe),
    )


def _parts(logits: LazyLogits) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Recipe]:
    recipe, linear = logits._recipe, logits._call.summands[0].linear
    hidden = logits._hiddens[0].flatten(0, -2).to(recipe.computed_in)
    bias = None if linear.bias is None else linear.bias[: recipe.vocab].to(recipe.computed_in)
    return hidden, linear.weight[: recipe.vocab].to(recipe.computed_in), bias, recipe


def _scale(recipe: Recipe) -> float:
    """after * tanh(scale * z) = softcap * tanh(scale * softcap * z / softcap)."""
    return recipe.scale * recipe.after if recipe.tanh else recipe.scale


def _softcap(recipe: Recipe) -> float | None:
    return abs(recipe.after) if recipe.tanh else None


def _of_logits(
    student: torch.Tensor, teacher: torch.Tensor, counted_N: torch.Tensor, temperature: float
) -> torch.Tensor:
    """A chunk of tokens at a time, whose probabilities are computed again in backward."""
    rows = zip(*(torch.split(one, CHUNK) for one in (student.flatten(0, -2), teacher.flatten(0, -2), counted_N)))
    parts = [checkpoint(_of_chunk, *row, temperature, use_reentrant=False) for row in rows]
    return temperature**2 * torch.stack(parts).sum()


def _of_chunk(
    student_CV: torch.Tensor, teacher_CV: torch.Tensor, counted_C: torch.Tensor, temperature: float
) -> torch.Tensor:
    log_q = F.log_softmax(student_CV.float() / temperature, -1)
    log_p = F.log_softmax(teacher_CV.float() / temperature, -1)
    loss_C = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return torch.where(counted_C, loss_C, 0.0).sum()
