"""Launches of the kernels of low-rank adapters that are compiled ahead of time."""

import torch

from automodel_accel.kernels.lora import Form, fused
from automodel_accel.kernels.lora.extension import padded
from tests.ops.aot_cases import AotCase

ROWS = 256
SEED = 1 << 62 | 1


def _lora(dtype: torch.dtype, hidden: int, rank: int, count: int = 3, dropout: float = 0.0) -> list[AotCase]:
    """Adapters in float32 of linears in `dtype`, as PEFT keeps them, with columns beside weights and input."""
    columns = count * padded(rank)
    x, dx = (torch.ones(ROWS, hidden + columns, dtype=dtype)[:, :hidden] for _ in "xd")
    dp = torch.ones(ROWS, hidden + columns, dtype=dtype)[:, hidden:]
    group = [
        fused.Placed(
            i,
            i,
            torch.ones(rank, hidden),
            torch.ones(1024, rank),
            Form(2.0, dropout),
            i * padded(rank),
            torch.ones(1024, hidden + columns, dtype=dtype),
        )
        for i in range(count)
    ]
    fit = (1, False, 2 if rank > 128 else 0)  # its tiles are narrower than a program of AMD's is wide
    name = f"{dtype}/{hidden}/rank {rank}, {count} adapters, dropout {dropout}"
    return [
        AotCase(f"lora/project/{name}", lambda: fused.project(x, group, columns, SEED, beside=True), *fit),
        AotCase(f"lora/grad_a/{name}", lambda: fused.grad_a(x, dp, group, SEED), *fit),
        AotCase(f"lora/add_grad_input/{name}", lambda: fused.add_grad_input(dx, dp, group, SEED), *fit),
    ]


LORA = [
    *(case for dropout in (0.0, 0.05) for case in _lora(torch.bfloat16, 4096, 16, dropout=dropout)),
    *_lora(torch.bfloat16, 14336, 64, 1, 0.05),
    *_lora(torch.bfloat16, 4096, 256),
    *_lora(torch.float32, 4096, 16, dropout=0.05),
]
