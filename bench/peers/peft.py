"""PEFT's LoRA layers, as they stand in a model."""

from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import nn

from bench.case import Forward, Inputs

NAMES = ("gate", "up")


def forwards(variant: str) -> Mapping[str, Forward]:
    """What PEFT has."""
    return {"lora": _Layers()}


class _Layers:
    """The layers around the weights of a case, made once."""

    def __init__(self) -> None:
        self._made: tuple[torch.Tensor, nn.Module] | None = None

    def __call__(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        x: torch.Tensor = inputs["x"]
        if self._made is None or self._made[0] is not x:
            self._made = x, _layers(inputs)
        return tuple(getattr(self._made[1], name)(x) for name in NAMES)


def _layers(inputs: Inputs) -> nn.Module:
    sizes = {name: inputs[f"{name}_weight"].shape for name in NAMES}
    model: Any = nn.ModuleDict({name: nn.Linear(h, f, bias=False, device="meta") for name, (f, h) in sizes.items()})
    rank = inputs["gate_a"].shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=round(inputs["scale"] * rank), target_modules=list(NAMES))
    peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    for name in NAMES:
        layer = getattr(model, name)
        parts = ((layer.base_layer, "weight"), (layer.lora_A["default"], "a"), (layer.lora_B["default"], "b"))
        for linear, part in parts:
            del linear.weight
            linear.weight = inputs[f"{name}_{part}"]  # the case's own leaves, which get the gradients
    return model.train()  # type: ignore[no-any-return]
