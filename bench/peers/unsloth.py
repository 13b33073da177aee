"""Unsloth's kernels, called as its models call them. Read in 2026.10.9.

Its gated activation has no autograd of its own: a LoRA function calls the two kernels, so the same is done here. It has no function
of two adapted linears of one input, so each takes the one of a single linear; its whole layer has LoRA_QKV, LoRA_W and LoRA_MLP.
"""

import tempfile
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import unsloth  # it must be imported before its parts, and before transformers
from transformers import AutoModelForCausalLM
from unsloth.kernels import geglu, swiglu
from unsloth.kernels.cross_entropy_loss import fast_cross_entropy_loss
from unsloth.kernels.fast_lora import LoRA_W
from unsloth.kernels.layernorm import fast_layernorm
from unsloth.kernels.rms_layernorm import fast_rms_layernorm
from unsloth.kernels.rope_embedding import fast_rope_embedding

from bench import tokenizer
from bench.case import Forward, Inputs
from bench.layer import LINEARS, Built, config, last_hidden_state, place

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
        "lora": lambda inputs: tuple(_adapted(name, inputs) for name in ("gate_proj", "up_proj")),
        "lora_layer": Built(_layer_model, last_hidden_state),
    }


def _adapted(name: str, inputs: Inputs) -> torch.Tensor:
    weight = inputs[f"{name}_weight"]
    if f"{name}_a" not in inputs:
        return F.linear(inputs["x"], weight)
    found: torch.Tensor = LoRA_W.apply(
        inputs["x"][None], weight, None, inputs[f"{name}_a"], inputs[f"{name}_b"], inputs["scale"]
    )
    return found[0]


def _layer_model(inputs: Inputs) -> torch.nn.Module:
    """The model as Unsloth loads and patches it, from a folder: it takes no config. Without adapters: as it loads it."""
    x: torch.Tensor = inputs["x"]
    with tempfile.TemporaryDirectory() as folder:
        auto: Any = AutoModelForCausalLM
        auto.from_config(config(inputs), dtype=x.dtype).save_pretrained(folder)
        tokenizer.save(folder)
        options = {"max_seq_length": x.shape[1], "dtype": x.dtype, "load_in_4bit": False}
        model, _ = unsloth.FastLanguageModel.from_pretrained(folder, **options)
    if "q_proj_a" in inputs:
        rank = inputs["q_proj_a"].shape[0]
        adapters = {"r": rank, "lora_alpha": round(inputs["scale"] * rank), "lora_dropout": 0}
        model = unsloth.FastLanguageModel.get_peft_model(
            model, **adapters, target_modules=list(LINEARS), use_gradient_checkpointing=False
        )
        model = model.get_base_model()
    place(model.model, inputs)
    found: torch.nn.Module = model.model.train()
    return found


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
