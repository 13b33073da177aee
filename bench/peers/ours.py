"""automodel_accel's kernels: what `auto` takes, or the implementation that a case names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import automodel_accel
from automodel_accel.kernels.activation import activation
from automodel_accel.kernels.attention import attention
from automodel_accel.kernels.contract import AUTO
from automodel_accel.kernels.fp8_linear import Recipe, fp8_linears
from automodel_accel.kernels.fp8_linear.weights import HeldCast
from automodel_accel.kernels.gated_linear import gated_linear
from automodel_accel.kernels.layer_norm import layer_norm
from automodel_accel.kernels.linear import linears
from automodel_accel.kernels.linear_cross_entropy import linear_cross_entropy
from automodel_accel.kernels.lora import Adapter, Form
from automodel_accel.kernels.rms_norm import add_rms_norm, rms_norm
from automodel_accel.kernels.rope import rope
from bench.case import Forward, Inputs, weights


def forwards(variant: str) -> Mapping[str, Forward]:
    """Every operation."""
    return {
        "rms_norm": lambda inputs: rms_norm(inputs["x"], inputs["weight"], **_norm(inputs), **_named(inputs)),
        "add_rms_norm": lambda inputs: add_rms_norm(
            inputs["x"], inputs["residual"], inputs["weight"], **_norm(inputs), **_named(inputs)
        ),
        "layer_norm": lambda inputs: layer_norm(
            inputs["x"], inputs["weight"], inputs["bias"], inputs["eps"], **_named(inputs)
        ),
        "gated_linear": lambda inputs: gated_linear(
            inputs["gate"], inputs["up"], activation=inputs["activation"], **_named(inputs)
        ),
        "activation": lambda inputs: activation(inputs["x"], inputs["activation"], **_named(inputs)),
        "lora": _lora,
        "lora_layer": _lora_layer(),
        "fp8": _fp8,
        "rope": _rope,
        "attention": lambda inputs: attention(
            *(inputs[name].transpose(1, 2) for name in ("q", "k", "v")), **_named(inputs)
        ),
        "linear_cross_entropy": lambda inputs: linear_cross_entropy(
            inputs["hidden"], inputs["weight"], inputs["target"], softcap=inputs["softcap"], **_named(inputs)
        ),
        "cross_entropy": _cross_entropy,
    }


def _named(inputs: Inputs) -> dict[str, Any]:
    return {"implementation": inputs.get("implementation", AUTO)}


def _norm(inputs: Inputs) -> dict[str, Any]:
    return {name: inputs[name] for name in ("eps", "offset", "order")}


def _lora(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    form, names = Form(inputs["scale"]), ("gate_proj", "up_proj")
    adapters = [Adapter(inputs[f"{name}_a"], inputs[f"{name}_b"], form) for name in names if f"{name}_a" in inputs]
    weights = [inputs[f"{name}_weight"] for name in names]
    return linears(inputs["x"], weights, [None, None], adapters=adapters, **_named(inputs))


def _lora_layer() -> Forward:
    """PEFT's layers in transformers' model, applied; "selective" is no implementation but a setting."""
    from bench.layer import Built, build, last_hidden_state

    def make(inputs: Inputs) -> nn.Module:
        recompute = "selective" if inputs.get("implementation") == "selective" else None
        return automodel_accel.apply(build(inputs), recompute=recompute)

    return Built(make, last_hidden_state)


def _fp8(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """ "rowwise" is no implementation but a recipe. Weights that train are cast in each call, as after each step; frozen ones once."""
    each = weights(inputs)
    trains = any(weight.requires_grad for weight in each)
    held = HeldCast() if trains else inputs.setdefault("held", HeldCast())
    recipe = Recipe(rowwise=inputs.get("implementation") == "rowwise")
    return fp8_linears(inputs["x"], each, [None] * len(each), recipe, held=held)


def _rope(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    turned = rope(
        inputs["q"].transpose(1, 2), inputs["k"].transpose(1, 2), inputs["cos"], inputs["sin"], **_named(inputs)
    )
    return turned  # type: ignore[return-value]  # keys were given


def _cross_entropy(inputs: Inputs) -> torch.Tensor:
    from automodel_accel.kernels.cross_entropy import cross_entropy

    return cross_entropy(inputs["logits"], inputs["target"], softcap=inputs["softcap"], **_named(inputs))
