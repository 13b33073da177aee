"""Launches of `activation` that are compiled ahead of time: every activation, contiguous and strided."""

import torch

from automodel_accel.kernels.activation import ACTIVATIONS
from automodel_accel.kernels.activation import fused as activation
from tests.ops.aot_cases import DTYPES, ROWS, AotCase, with_room

WIDTH = 8192


def _activation(dtype: torch.dtype, name: str, strided: bool = False) -> list[AotCase]:
    x = torch.ones(ROWS, 2 * WIDTH, dtype=dtype).chunk(2, -1)[0]
    x = x if strided else x.contiguous()
    label = f"{dtype}/{WIDTH}/{name}" + ("/strided" if strided else "")
    return [
        AotCase(f"activation/forward/{label}", lambda: activation.forward(x, name), 10),
        AotCase(f"activation/backward/{label}", lambda: activation.backward(x, x, name), 10),
    ]


ACTIVATION = [
    *(case for name in ACTIVATIONS for case in _activation(torch.bfloat16, name)),
    *(case for dtype in DTYPES for case in _activation(dtype, "quick_gelu", strided=True)),
    with_room(_activation(torch.bfloat16, "gelu")[0]),
]
