"""Torch, operation by operation, as the models of transformers have it; and the same under torch.compile.

Written out as in `LlamaRMSNorm`, `Gemma2RMSNorm`, `LlamaMLP`, `LlamaDecoderLayer`, `apply_rotary_pos_emb`, `sdpa_attention_forward`,
`ForCausalLMLoss` and PEFT's `lora.Linear`: what a user runs who changes nothing.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from bench.case import Forward, Inputs, weights

IGNORE_INDEX = -100


def forwards(variant: str) -> Mapping[str, Forward]:
    """Every operation; compiled for "compile"."""
    plain: dict[str, Forward] = {
        "rms_norm": lambda inputs: _rms_norm(inputs["x"], inputs),
        "add_rms_norm": _add_rms_norm,
        "layer_norm": _layer_norm,
        "gated_linear": lambda inputs: _activated(inputs["gate"], inputs["activation"]) * inputs["up"],
        "activation": lambda inputs: _activated(inputs["x"], inputs["activation"]),
        "lora": lambda inputs: tuple(_adapted(name, inputs["x"], inputs) for name in ("gate_proj", "up_proj")),
        "lora_layer": _lora_layer,
        "fp8": lambda inputs: tuple(F.linear(inputs["x"], weight) for weight in weights(inputs)),
        "rope": _rope,
        "attention": _attention,
        "linear_cross_entropy": _linear_cross_entropy,
        "cross_entropy": lambda inputs: _loss(inputs["logits"], inputs),
    }
    if variant != "compile":
        return plain
    return {name: torch.compile(forward, dynamic=False) for name, forward in plain.items()}


def _wide(x: torch.Tensor) -> torch.Tensor:
    """As `x.float()`, which models write, but float64 stays what it is, so that this can be its own truth."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rms_norm(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + inputs["eps"])
    weight: torch.Tensor = inputs["weight"]
    if inputs["order"] == "cast_then_mul":
        return (weight + inputs["offset"] if inputs["offset"] else weight) * normed.to(x.dtype)
    scale: torch.Tensor = inputs["offset"] + _wide(weight)
    return (normed * scale).to(x.dtype)


def _add_rms_norm(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    h = inputs["residual"] + inputs["x"]
    return _rms_norm(h, inputs), h


def _layer_norm(inputs: Inputs) -> torch.Tensor:
    x = inputs["x"]
    return F.layer_norm(x, x.shape[-1:], inputs["weight"], inputs["bias"], inputs["eps"])


def _activated(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh") if name == "gelu_tanh" else F.silu(x)


def _adapted(name: str, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """As in PEFT's `lora.Linear`; the linear alone where it has no adapter."""
    base = F.linear(x, inputs[f"{name}_weight"])
    if f"{name}_a" not in inputs:
        return base
    low_rank = F.linear(F.linear(x, inputs[f"{name}_a"]), inputs[f"{name}_b"])
    return base + low_rank * float(inputs["scale"])


def _lora_layer(inputs: Inputs) -> torch.Tensor:
    x: torch.Tensor = inputs["x"]
    normed = _named_norm("input_layernorm", x, inputs)
    q, k, v = (_adapted(name, normed, inputs) for name in ("q_proj", "k_proj", "v_proj"))
    q, k, v = (each.view(*x.shape[:2], -1, inputs["head_dim"]) for each in (q, k, v))
    q, k = _rope({**inputs, "q": q, "k": k})
    attended = F.scaled_dot_product_attention(
        q, k, v.transpose(1, 2), is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    h = x + _adapted("o_proj", attended.transpose(1, 2).flatten(2), inputs)
    normed = _named_norm("post_attention_layernorm", h, inputs)
    gate, up = (_adapted(name, normed, inputs) for name in ("gate_proj", "up_proj"))
    return _named_norm("norm", h + _adapted("down_proj", F.silu(gate) * up, inputs), inputs)


def _named_norm(name: str, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    llama = {"offset": 0.0, "order": "cast_then_mul", "eps": inputs["eps"]}
    return _rms_norm(x, {**llama, "weight": inputs[f"{name}_weight"]})


def _turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _rope(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = inputs["cos"][:, None], inputs["sin"][:, None]
    q, k = inputs["q"].transpose(1, 2), inputs["k"].transpose(1, 2)
    return q * cos + _turned(q) * sin, k * cos + _turned(k) * sin


def _attention(inputs: Inputs) -> torch.Tensor:
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _capped(logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    cap = inputs["softcap"]
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _loss(logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    return F.cross_entropy(_wide(_capped(logits, inputs)), inputs["target"], ignore_index=IGNORE_INDEX)


def _linear_cross_entropy(inputs: Inputs) -> torch.Tensor:
    # no name holds the logits: their memory is free once the loss is known, though a model would return them
    return _loss(F.linear(inputs["hidden"], inputs["weight"]), inputs)
