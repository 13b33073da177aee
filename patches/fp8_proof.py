"""How FP8 linears are proved: narrow linears of one input, swapped, against the definition of their products in float64.

Not against the linears as they were: 8-bit values differ from theirs by design. The definition (kernels/fp8_linear/reference.py)
rounds where the products do, and computes exactly. So what is judged is the casts and products of this very device, that each
gradient arrives where it belongs, and what an adapter adds. Theirs is the definition in the dtype under test. All values are few
multiples of a power of 2 whose sums every dtype holds, and some of which 8 bits round.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.fp8_linear import Recipe, reference
from automodel_accel.kernels.fp8_linear.delayed import note
from automodel_accel.kernels.fp8_linear.history import Histories, History
from automodel_accel.kernels.fp8_linear.scaling import formats_here
from automodel_accel.kernels.lora import draw_mask, generator_at, generator_state
from automodel_accel.kernels.lora.reference import low_rank
from automodel_accel.patches.contract import CallKey, Counts, Experiment, Proven
from automodel_accel.patches.linear_proof import (
    NOTED,
    PLAIN,
    Leaves,
    Way,
    adapter_of,
    autocast_of,
    draw_leaves,
    dtypes_of,
    input_of,
    members_of,
    parameters_of,
    total,
)

SIZES = (32, 16, 48, 32)  # of the input and, by turns, of the outputs
X_STEPS = 20  # values of 5 bits: 8-bit ones hold 4
WAYS = (PLAIN, NOTED, Way(0.5, frozen=True))

# members that share an input, the input, the recipe, what was proved, counts -> their outputs
Swapped = Callable[[list[nn.Module], torch.Tensor, Recipe, Proven, Counts], list[torch.Tensor]]


def experiment(
    form: Any, layers: Sequence[Any], key: CallKey, recipe: Recipe, implementation: str, swapped: Swapped
) -> Experiment:
    """The linears `layers` (those of the form's groups in order, or one alone) by one recipe and implementation."""
    device, *_, low = key
    inputs = draw_leaves(form, low is not None, SIZES, X_STEPS)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    numbers, state = inputs["x"].device, generator_state(inputs["x"].device)
    autocast = autocast_of(key)

    def ours(leaves: Leaves) -> torch.Tensor:
        outputs, counts = [], Counts()
        with generator_at(state, numbers):
            for way in WAYS:
                members = members_of(form, layers, leaves, way, [nn.Dropout(way.dropout)] * len(form.biases))
                outputs += swapped(members, input_of(leaves["x"], way), recipe, {key: implementation}, counts)
        if counts.fused["fp8"] != len(WAYS):
            raise RuntimeError(f"the swapped linears did not take the fused path: {dict(counts.passed_on)}")
        return total(outputs)

    def definition(leaves: Leaves) -> torch.Tensor:
        with generator_at(state, numbers):
            return total([output for way in WAYS for output in _defined(form, leaves, recipe, way, low, autocast)])

    dtypes = dtypes_of(inputs, key)
    return Experiment(inputs, dtypes, theirs=definition, ours=ours, truth=definition, autocast=autocast)


def histories_of(x: torch.Tensor) -> Histories:
    """As after a call with x: its scale is then twice that of the definition, in which all of its values are the same."""
    histories = Histories()
    note([x.detach()], histories.x)
    return histories


def follow(history: History, outputs: Sequence[torch.Tensor]) -> None:
    """Have the history of their gradients hold these before they are cast."""
    for output in outputs:
        if output.requires_grad:
            output.register_hook(lambda gradient: note([gradient], history))  # type: ignore[no-untyped-call]


def _defined(
    form: Any, leaves: Leaves, recipe: Recipe, way: Way, low: torch.dtype | None, autocast: torch.dtype | None
) -> list[torch.Tensor]:
    x, formats = leaves["x"], formats_here()
    gradients = formats.e5m2 if recipe.wide_gradients else formats.e4m3
    products = reference.fp8_linears(x, *parameters_of(form, leaves, way), recipe.rowwise, formats.e4m3, gradients)
    outputs = [one if x.dtype is torch.float64 or autocast is None else one.to(autocast) for one in products]
    for i, output in enumerate(outputs):
        if (adapter := adapter_of(leaves, i, way.dropout)) is not None:
            mask = draw_mask(x.detach().to(low if autocast is None else autocast), way.dropout) if way.dropout else None
            outputs[i] = output + low_rank(x, adapter, mask).to(output.dtype)
    return outputs
