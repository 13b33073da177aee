"""FlashAttention 2. Read in 2.8."""

from collections.abc import Mapping

import torch
from flash_attn import flash_attn_func

from bench.case import Forward, Inputs


def forwards(variant: str) -> Mapping[str, Forward]:
    """Causal attention."""
    return {"attention": _attention}


def _attention(inputs: Inputs) -> torch.Tensor:
    found: torch.Tensor = flash_attn_func(inputs["q"], inputs["k"], inputs["v"], causal=True)
    return found.transpose(1, 2)
