"""Liger-Kernel, as it patches models: in place where its patches are. Read in 0.8.5."""

from collections.abc import Mapping

import torch
from liger_kernel.transformers import functional

from bench.case import Forward, Inputs, UnsupportedError


def forwards(variant: str) -> Mapping[str, Forward]:
    """The operations that Liger-Kernel has."""
    return {
        "rms_norm": lambda inputs: functional.liger_rms_norm(inputs["x"], *_norm(inputs)),
        "add_rms_norm": lambda inputs: functional.liger_fused_add_rms_norm(
            inputs["x"], inputs["residual"], *_norm(inputs)
        ),
        "layer_norm": lambda inputs: functional.liger_layer_norm(
            inputs["x"], inputs["weight"], inputs["bias"], inputs["eps"]
        ),
        "gated_linear": _gated_linear,
        "activation": _activation,
        "rope": lambda inputs: functional.liger_rope(
            inputs["q"].transpose(1, 2), inputs["k"].transpose(1, 2), inputs["cos"], inputs["sin"]
        ),
        "linear_cross_entropy": lambda inputs: functional.liger_fused_linear_cross_entropy(
            inputs["hidden"], inputs["weight"], inputs["target"], softcap=inputs["softcap"]
        ),
        "cross_entropy": lambda inputs: functional.liger_cross_entropy(
            inputs["logits"], inputs["target"], softcap=inputs["softcap"]
        ),
    }


def _norm(inputs: Inputs) -> tuple[torch.Tensor, float, float, str, bool]:
    """Weight, eps, offset, casting mode, and whether dx overwrites dy: not for Gemma, as in its patches."""
    gemma = inputs["order"] == "mul_then_cast"
    return inputs["weight"], inputs["eps"], inputs["offset"], "gemma" if gemma else "llama", not gemma


def _gated_linear(inputs: Inputs) -> torch.Tensor:
    gated = {"silu": functional.liger_swiglu, "gelu_tanh": functional.liger_geglu}[inputs["activation"]]
    found: torch.Tensor = gated(inputs["gate"], inputs["up"])
    return found


def _activation(inputs: Inputs) -> torch.Tensor:
    if inputs["activation"] != "relu2":
        raise UnsupportedError(f"has no kernel of {inputs['activation']} without a gate")
    found: torch.Tensor = functional.liger_relu_squared(inputs["x"])
    return found
