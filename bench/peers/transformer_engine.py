"""Transformer Engine. Read in 2.20.2.

Its activations take gate and up as one packed tensor, so packing counts: a model that has them apart would pay it. Its modules
hold their own parameters; here they are given the case's.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from transformer_engine.common.recipe import Float8CurrentScaling
from transformer_engine.pytorch import ops
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

from bench.case import Forward, Inputs, UnsupportedError, weights


def forwards(variant: str) -> Mapping[str, Forward]:
    """The operations that Transformer Engine has, each with its modules made once."""
    return {
        "rms_norm": _Norm(te.RMSNorm),
        "layer_norm": _Norm(te.LayerNorm),
        "gated_linear": _Activation({"silu": ops.SwiGLU, "gelu_tanh": ops.GEGLU}, packed=True),
        "activation": _Activation({"gelu_tanh": ops.GELU, "relu2": ops.SReLU}, packed=False),
        "rope": _rope,
        "fp8": _fp8,
        "attention": _Attention(),
        "linear_cross_entropy": lambda inputs: _loss(F.linear(inputs["hidden"], inputs["weight"]), inputs),
        "cross_entropy": lambda inputs: _loss(inputs["logits"], inputs),
    }


class _Norm:
    def __init__(self, kind: type[torch.nn.Module]) -> None:
        self.kind = kind

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        if "module" not in inputs:
            weight = inputs["weight"]
            inputs["module"] = self.kind(
                weight.shape[0],
                eps=inputs["eps"],
                zero_centered_gamma=inputs["offset"] == 1.0,
                device=weight.device,
                dtype=weight.dtype,
            )
            for name in ("weight", "bias"):
                if name in inputs:
                    inputs[name] = torch.nn.Parameter(inputs[name].detach())
                    setattr(inputs["module"], name, inputs[name])
        found: torch.Tensor = inputs["module"](inputs["x"])
        return found


class _Activation:
    def __init__(self, kinds: Mapping[str, type[torch.nn.Module]], packed: bool) -> None:
        self.modules = {name: kind() for name, kind in kinds.items()}
        self.packed = packed

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        if inputs["activation"] not in self.modules:
            raise UnsupportedError(f"has no {inputs['activation']}")
        x = torch.cat((inputs["gate"], inputs["up"]), -1) if self.packed else inputs["x"]
        found: torch.Tensor = self.modules[inputs["activation"]](x)
        return found


class _Attention:
    def __init__(self) -> None:
        self.modules: dict[tuple[int, int, int], torch.nn.Module] = {}

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        (heads, width), key_heads = inputs["q"].shape[-2:], inputs["k"].shape[-2]
        key = heads, width, key_heads
        if key not in self.modules:
            options = {"num_gqa_groups": key_heads, "attn_mask_type": "causal", "qkv_format": "bshd"}
            self.modules[key] = te.DotProductAttention(heads, width, **options)
        found = self.modules[key](inputs["q"], inputs["k"], inputs["v"])  # [1, tokens, heads * width]
        heads_apart: torch.Tensor = found.unflatten(-1, (heads, width)).transpose(1, 2)
        return heads_apart


def _fp8(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The linears of one input as one module, as in its own attention; frozen weights are cast in the first call alone."""
    each, first = weights(inputs), "module" not in inputs
    names = {f"part_{number}_": len(weight) for number, weight in enumerate(each)}
    if first:
        x, total = inputs["x"], sum(names.values())
        options = {"bias": False, "params_dtype": x.dtype, "device": x.device}
        inputs["module"] = te.Linear(x.shape[1], total, parameters_split=names, **options)
        for name, weight in zip(names, each, strict=True):
            setattr(inputs["module"], f"{name}weight", weight)
    with te.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
        trains = any(weight.requires_grad for weight in each)
        y = inputs["module"](inputs["x"], is_first_microbatch=None if trains else first)
    return tuple(y.split(list(names.values()), -1))


def _rope(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    if (
        "angles" not in inputs
    ):  # it takes angles, one an element, in place of their cosine and sine; made once, as a model would
        inputs["angles"] = torch.atan2(inputs["sin"][0].float(), inputs["cos"][0].float())[:, None, None]
    angles = inputs["angles"]
    q, k = (apply_rotary_pos_emb(inputs[name], angles, tensor_format="bshd", fused=True) for name in ("q", "k"))
    return q.transpose(1, 2), k.transpose(1, 2)


def _loss(logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    if inputs["softcap"] is not None:
        raise UnsupportedError("has no soft-cap")
    found: torch.Tensor = parallel_cross_entropy(logits[None], inputs["target"][None], reduce_loss=True)
    return found
