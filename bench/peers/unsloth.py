"""Unsloth's kernels, called as its models call them. Read in 2026.10.9.

Its gated activation has no autograd of its own: a LoRA function calls the two kernels, so the same is done here.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import unsloth  # noqa: F401  # it must be imported before its parts
from unsloth.kernels import geglu, swiglu
from unsloth.kernels.cross_entropy_loss import fast_cross_entropy_loss
from unsloth.kernels.layernorm import fast_layernorm
from unsloth.kernels.rms_layernorm import fast_rms_layernorm
from unsloth.kernels.rope_embedding import fast_rope_embedding

from bench.case import Forward, Inputs

GATED = {
    "silu": (swiglu.swiglu_fg_kernel, swiglu.swiglu_DWf_DW_dfg_kernel),
    "gelu_tanh": (geglu.geglu_approx_forward_kernel, geglu.geglu_approx_backward_kernel),
}


def forwards(variant: str) -> Mapping[str, Forward]:
    """The operations that Unsloth has kernels of."""
    return {
        "rms_norm": lambda inputs: fast_rms_layernorm(_layer(inputs), inputs["x"], gemma=inputs["offset"] == 1.0),
        "layer_norm": lambda inputs: fast_layernorm(_layer(inputs), inputs["x"]),
        "gated_linear": _gated_linear,
        "rope": lambda inputs: fast_rope_embedding(
            inputs["q"].transpose(1, 2), inputs["k"].transpose(1, 2), inputs["cos"], inputs["sin"]
        ),
        "cross_entropy": lambda inputs: fast_cross_entropy_loss(
            inputs["logits"][None], inputs["target"][None], logit_softcapping=inputs["softcap"] or 0
        ),
    }


def _gated_linear(inputs: Inputs) -> torch.Tensor:
    kernels = GATED[inputs["activation"]]
    found: torch.Tensor = _Gated.apply(inputs["gate"], inputs["up"], *kernels)  # type: ignore[no-untyped-call]
    return found


def _layer(inputs: Inputs) -> SimpleNamespace:
    return SimpleNamespace(weight=inputs["weight"], bias=inputs.get("bias"), eps=inputs["eps"], elementwise_affine=True)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, forward: Any, backward: Any) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernel = backward
        found: torch.Tensor = forward(gate[None], up[None])[0]
        return found

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        # it writes y, grad_up and grad_gate over grad, gate and up, as it does in its models
        _, grad_up, grad_gate = ctx.kernel(grad, *ctx.saved_tensors)
        return grad_gate, grad_up, None, None
