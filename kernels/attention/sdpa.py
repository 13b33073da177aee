"""`attention` by `torch.nn.functional.scaled_dot_product_attention`: on GPUs cuDNN or flash, where these serve the call.

It has no documents, windows, sinks or soft-caps; a dense mask may say what it likes. Grouped key heads are not repeated, except
under a mask, with which no fused kernel takes groups.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# best first, as measured by others on Hopper; a kernel that cannot serve a call is passed over by torch
_GPU_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(
    query_BHSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTE: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """Return the output [B, H, S, E]; arguments as in `automodel_accel.kernels.attention.attention`."""
    groups = query_BHSD.shape[1] // key_BKTD.shape[1]
    if groups > 1 and mask is not None:
        key_BKTD, value_BKTE = (x.repeat_interleave(groups, 1) for x in (key_BKTD, value_BKTE))
        groups = 1
    with _preference(query_BHSD):
        return F.scaled_dot_product_attention(
            query_BHSD, key_BKTD, value_BKTE, mask, dropout_p, causal, scale=scale, enable_gqa=groups > 1
        )


def _preference(query: torch.Tensor) -> AbstractContextManager[None]:
    return sdpa_kernel(_GPU_ORDER, set_priority=True) if query.device.type == "cuda" else nullcontext()
