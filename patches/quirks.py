"""The one table of exceptions, at most 20 rows. Everything else is found by structure."""

from collections.abc import Mapping
from types import MappingProxyType

# top-level package -> name for people: modules whose code comes from there were already changed by another accelerator
OTHER_ACCELERATORS: Mapping[str, str] = MappingProxyType(
    {
        "liger_kernel": "Liger-Kernel",
        "kernels": "Hugging Face kernels",
        "unsloth": "Unsloth",
        "unsloth_zoo": "Unsloth",
        "cut_cross_entropy": "cut-cross-entropy",
        "transformer_engine": "Transformer Engine",
    }
)
