"""PEFT's LoRA layers, as they stand in a model; and in one that Liger-Kernel has patched. Liger read in 0.8.5."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bench.case import Forward, Inputs
from bench.layer import Built, add_adapters, build, last_hidden_state, place

PAIR = ("gate_proj", "up_proj")


def forwards(variant: str) -> Mapping[str, Forward]:
    """What PEFT has, or with Liger-Kernel."""
    if variant == "peft+liger":
        return {"lora_layer": Built(lambda inputs: build(inputs, _patched_by_liger), last_hidden_state)}
    return {"lora": Built(_pair, _both), "lora_layer": Built(build, last_hidden_state)}


def _pair(inputs: Inputs) -> nn.Module:
    sizes = {name: inputs[f"{name}_weight"].shape for name in PAIR}
    pair: Any = nn.ModuleDict({name: nn.Linear(h, f, bias=False, device="meta") for name, (f, h) in sizes.items()})
    if f"{PAIR[0]}_a" in inputs:
        add_adapters(pair, inputs, PAIR)
    place(pair, inputs)
    return pair.train()  # type: ignore[no-any-return]


def _both(pair: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(pair[name](x) for name in PAIR)


def _patched_by_liger(model: nn.Module) -> None:
    """Its norms, rope and swiglu; the losses are no part of a layer."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False, model=model)
