"""Torch's own fused operations, which the models of transformers do not call."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from bench.case import Forward, Inputs, UnsupportedError

IGNORE_INDEX = -100


def forwards(variant: str) -> Mapping[str, Forward]:
    """The operations that torch has whole."""
    return {"rms_norm": _rms_norm, "linear_cross_entropy": _linear_cross_entropy}


def _rms_norm(inputs: Inputs) -> torch.Tensor:
    weight = inputs["weight"] + inputs["offset"] if inputs["offset"] else inputs["weight"]
    return F.rms_norm(inputs["x"], weight.shape, weight, inputs["eps"])


def _linear_cross_entropy(inputs: Inputs) -> torch.Tensor:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise UnsupportedError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    if inputs["softcap"] is not None:
        raise UnsupportedError("has no soft-cap")
    found: torch.Tensor = F.linear_cross_entropy(
        inputs["hidden"],
        inputs["weight"],
        inputs["target"],
        ignore_index=IGNORE_INDEX,
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return found
