"""torchao's float8 linears with its settings as they come, and under torch.compile, for which they are made. Read in 0.18.0."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchao.float8 import convert_to_float8_training

from bench.case import Forward, Inputs, weights


def forwards(variant: str) -> Mapping[str, Forward]:
    """Linears; compiled for "torchao-compile"."""

    def fp8(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        if "module" not in inputs:
            module = convert_to_float8_training(_Linears(weights(inputs)))
            inputs["module"] = torch.compile(module, dynamic=False) if variant == "torchao-compile" else module
        found: tuple[torch.Tensor, ...] = inputs["module"](inputs["x"])
        return found

    return {"fp8": fp8}


class _Linears(nn.Module):
    """Those of one input, with these weights."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.each: Any = nn.ModuleList()
        for weight in parameters:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = weight
            self.each.append(linear)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(linear(x) for linear in self.each)
