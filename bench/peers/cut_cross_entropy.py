"""cut-cross-entropy. Read in 25.1.1: `filter_eps` drops small gradients; None keeps all."""

from collections.abc import Mapping
from typing import Any

import torch
from cut_cross_entropy import linear_cross_entropy

from bench.case import Forward, Inputs

SETTINGS: Mapping[str, dict[str, Any]] = {
    "cce": {},
    "cce-exact": {"filter_eps": None},
    "cce-compile": {"impl": "torch_compile"},
}


def forwards(variant: str) -> Mapping[str, Forward]:
    """The loss, by the settings of the variant."""
    settings = SETTINGS[variant]

    def forward(inputs: Inputs) -> torch.Tensor:
        tensors = inputs["hidden"], inputs["weight"], inputs["target"]
        loss: torch.Tensor = linear_cross_entropy(*tensors, softcap=inputs["softcap"], **settings)
        return loss

    return {"linear_cross_entropy": forward}
