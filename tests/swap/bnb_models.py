"""Models with the linears of bitsandbytes, and what their weights stand for."""

import copy
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from tests.swap.test_lora import NAMES

bnb = pytest.importorskip("bitsandbytes")


def quantised(model: nn.Module, bits: int, double: bool = True, compute: torch.dtype | None = None) -> nn.Module:
    """The model with each linear of a name in NAMES replaced by the library's."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if name in NAMES and type(linear) is nn.Linear:
                setattr(parent, name, of_library(linear, bits, double, compute))
    return marked(model)


def marked(model: nn.Module) -> nn.Module:
    """As transformers marks it, for PEFT."""
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True  # type: ignore[assignment]
    return model


def of_library(linear: nn.Linear, bits: int, double: bool, compute: torch.dtype | None) -> nn.Module:
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if bits == 4:
        made = bnb.nn.Linear4bit(*sizes, bias, compute_dtype=compute, compress_statistics=double, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4", module=made
        )
    else:
        made = bnb.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False, threshold=6.0)
        made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    if bias:
        made.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return made.to("cpu")  # type: ignore[no-any-return]  # which quantises


def dequantised(layer: Any) -> nn.Linear:
    """The linear that the library's stands for, in float64."""
    base = layer.base_layer
    if isinstance(base, bnb.nn.Linear4bit):
        weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()
    else:
        scales = base.state.SCB if base.weight.SCB is None else base.weight.SCB
        weight = base.weight.data.double() * scales.double()[:, None] / 127
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, dtype=torch.float64)
    plain.weight.data = weight
    if base.bias is not None:
        plain.bias.data = base.bias.data.double()
    return plain.requires_grad_(False)


def truth_of(model: nn.Module) -> nn.Module:
    """PEFT in float64 around what the quantised weights stand for."""
    truth = copy.deepcopy(model)
    for layer in truth.modules():
        if isinstance(layer, LoraLayer):
            layer.base_layer = dequantised(layer)  # type: ignore[assignment]
    return truth.double()
