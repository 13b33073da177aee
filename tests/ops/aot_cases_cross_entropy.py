"""Launches of `cross_entropy` that are compiled ahead of time: vocabularies of Llama 3 and Gemma, and one that is odd."""

import torch

from automodel_accel.kernels.cross_entropy import fused as cross_entropy
from tests.ops.aot_cases import DTYPES, ROWS, AotCase


def _cross_entropy(
    dtype: torch.dtype, vocab: int, softcap: float | None = None, smoothing: float = 0.0, z_loss: float = 0.0
) -> list[AotCase]:
    logits = torch.ones(ROWS, vocab, dtype=dtype)
    target, weight, stats = torch.ones(ROWS, dtype=torch.int64), torch.ones(()).expand(ROWS), torch.ones(2, ROWS)
    form = (0.5, softcap, -100, smoothing, z_loss)
    name = f"{dtype}/{vocab}/softcap {softcap}/smoothing {smoothing}/z-loss {z_loss}"
    one_logit = int(dtype != torch.float32)
    return [
        AotCase(
            f"cross_entropy/forward/{name}", lambda: cross_entropy.forward(logits, target, *form), 3, False, one_logit
        ),
        AotCase(
            f"cross_entropy/backward/{name}", lambda: cross_entropy.backward(logits, target, weight, stats, *form), 4
        ),
    ]


CROSS_ENTROPY = [
    *(case for dtype in DTYPES for case in _cross_entropy(dtype, 128256)),
    *(case for dtype in DTYPES for case in _cross_entropy(dtype, 256000, 30.0, 0.1, 1e-4)),
]
