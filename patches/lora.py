"""PEFT's LoRA layers: which adapter a call of one adds, read from its attributes, or why PEFT's own forward must run.

PEFT stays the owner of configuration, adapters and files: nothing of a layer is replaced but what it computes with, and each call
reads what is active, merged or switched off at that moment.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from automodel_accel.kernels.lora import Adapter, Form, masks_are_torchs
from automodel_accel.patches.probe import functional_copy, linear_of
from automodel_accel.patches.retype import has_hooks, original_class

NAME = "proof"  # of the adapter of an example


def is_adapted(module: Any) -> bool:
    """Whether the module is PEFT's LoRA around a plain linear."""
    return original_class(module) is LoraLinear and original_class(module.base_layer) is nn.Linear


def base_of(module: Any) -> Any:
    """The linear itself, out of an adapted one too."""
    return module.base_layer if is_adapted(module) else module


def objection(layer: Any) -> str | None:
    """Why a call of an adapted linear is not the sum of its base and of one low-rank product."""
    if layer.disable_adapters or layer.merged:
        return "its adapters are merged or switched off"
    name, *others = [name for name in layer.active_adapters if name in layer.lora_A] or [None]
    if name is None or others:
        return f"{len(others) + 1} adapters are active" if others else "none of its adapters is active"
    if name in layer.lora_variant:
        return f"its adapter is a {type(layer.lora_variant[name]).__name__}"
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if (
        original_class(a) is not nn.Linear
        or original_class(b) is not nn.Linear
        or a.bias is not None
        or b.bias is not None
    ):
        return "its adapter is not two linears without bias"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"its dropout is a {type(dropout).__name__}"
    if any(map(has_hooks, (layer.base_layer, a, b, dropout))):
        return "there are hooks inside of it"
    if not all(type(part.weight) in (nn.Parameter, torch.Tensor) for part in (a, b)):
        return f"its adapter's weights are {type(a.weight).__name__}s"
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return "it may not cast its input"
    if a.weight.device != layer.base_layer.weight.device:
        return f"its adapter is on {a.weight.device}, its base on {layer.base_layer.weight.device}"
    return None


def draws_here(layer: Any, x: torch.Tensor, in_triton: bool) -> bool:
    """Whether a call drops elements of x by other random numbers than PEFT would: then it may not go to PEFT for want of gradients.

    A reentrant checkpoint runs without them first, and must drop what is dropped when it runs again.
    """
    return (in_triton or not masks_are_torchs(x.device)) and drops(layer)


def drops(layer: Any) -> bool:
    """Whether a call drops elements of its input, and is the sum of its base and of one low-rank product."""
    return layer.training and objection(layer) is None and adapter_of(layer).form.dropout > 0


def dtype_of_adapter(layer: Any) -> torch.dtype:
    """Dtype of the one active adapter."""
    dtype: torch.dtype = layer.lora_A[_active(layer)].weight.dtype
    return dtype


def adapter_of(layer: Any) -> Adapter:
    """The one active adapter."""
    name = _active(layer)
    dropout = layer.lora_dropout[name]
    probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, Form(layer.scaling[name], probability))


class Given(nn.Module):
    """Dropout by a mask that was drawn before, for a proof."""

    def __init__(self, mask: torch.Tensor, probability: float) -> None:
        super().__init__()
        self.mask, self.probability = mask, probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As nn.Dropout."""
        return x * self.mask.to(x.dtype) / (1 - self.probability)


def example(
    layer: Any, base: nn.Linear, a: torch.Tensor, b: torch.Tensor, dropout: nn.Module, scale: float
) -> nn.Module:
    """A layer of the same class with this base and one adapter, to be run in a proof."""
    parts: Mapping[str, nn.Module] = {
        "base_layer": base,
        "lora_A": nn.ModuleDict({NAME: linear_of(a, None)}),
        "lora_B": nn.ModuleDict({NAME: linear_of(b, None)}),
        "lora_dropout": nn.ModuleDict({NAME: dropout}),
    }
    copy = functional_copy(layer, {}, parts)
    copy.__class__ = original_class(layer)
    state = {"scaling": {NAME: scale}, "lora_variant": {}, "merged_adapters": []}
    vars(copy).update(state, _active_adapter=[NAME], _disable_adapters=False)
    return copy


def _active(layer: Any) -> Any:
    return next(name for name in layer.active_adapters if name in layer.lora_A)
