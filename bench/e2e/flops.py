"""Floating-point operations that a training step asks for: what MFU divides by time and peak.

A GEMM of [M, K] and [K, N] counts 2 M K N. Counted are the model's own: real tokens (no padding), attention between a token
and those before it in its own document, and nothing that a variant computes twice (recompute) or spares itself.

    full fine-tune     every linear and the head: output, gradient of the input, gradient of the weight
    LoRA, base         output and gradient of the input; the weight is frozen. Nothing before the first layer trains, so its
                       q, k and v have no gradient of their input either
    LoRA, adapter      x A and (x A) B: output, gradients of both weights and of x A, and of x where the base has one
    attention          q k and p v forward; the gradients of q, k, p and v

automodel_accel/flops.py counts the same from the modules of any model; the first layer's q, k and v are its one approximation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.e2e.shapes import Shape

READ_THE_EMBEDDING = 3  # the first layer's q, k and v


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one step, or of several added up."""

    linears: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    adapter: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.linears + self.attention + self.head + self.adapter


def causal_pairs(lengths: Sequence[int]) -> int:
    """Pairs of a token and one that it attends to: itself and those before it in its document."""
    return sum(length * (length + 1) // 2 for length in lengths)


def step_flops(shape: Shape, tokens: int, pairs: int, method: str, rank: int) -> Flops:
    """Forward and backward of `tokens` tokens, with `pairs` pairs of a token and one that it attends to."""
    lora = method == "lora"
    gemm = 2.0 * tokens
    layer = gemm * sum(one * other for one, other in shape.projections)
    unread = shape.projections[:READ_THE_EMBEDDING] if lora else ()
    linears = shape.layers * layer * (2 if lora else 3) - gemm * sum(one * other for one, other in unread)
    attention = 3 * shape.layers * 2 * 2.0 * pairs * shape.heads * shape.head_dim
    head = gemm * shape.hidden * shape.vocab * (2 if lora else 3)
    adapter = 0.0
    if lora:
        adapter = 3 * gemm * rank * shape.layers * sum(one + other for one, other in shape.projections)
        adapter -= gemm * rank * sum(one for one, _ in unread)
    return Flops(linears, attention, head, adapter)
