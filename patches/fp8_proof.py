"""How FP8 linears are proved: narrow linears of one input, swapped, against the definition of their products in float64.

Not against the linears as they were: 8-bit values differ from theirs by design. The definition (kernels/fp8_linear/reference.py)
rounds where the products do, and computes exactly. So what is judged is the casts and products of this very device, that each
gradient arrives where it belongs, and what an adapter adds. Theirs is the definition in the dtype under test. All values are few
multiples of a power of 2 whose sums every dtype holds, and some of which 8 bits round.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.fp8_linear import Recipe, reference
from automodel_accel.kernels.fp8_linear.delayed import note
from automodel_accel.kernels.fp8_linear.history import Histories, History
from automodel_accel.kernels.fp8_linear.scaling import formats_here
from automodel_accel.kernels.lora import Adapter, Form, draw_mask, generator_at, generator_state
from automodel_accel.kernels.lora.reference import low_rank
from automodel_accel.kernels.recompute import remember
from automodel_accel.patches import lora
from automodel_accel.patches.contract import CallKey, Counts, Experiment, Proven
from automodel_accel.patches.linear_proof import LOW_PRECISION, total
from automodel_accel.patches.probe import linear_of

SIZES = (32, 16, 48, 32)  # of the input and, by turns, of the outputs
RANK, SCALE = 4, 0.5
# dropout of the adapters, whether the input has a source, whether the weights train
WAYS = ((0.0, False, True), (0.5, True, True), (0.5, False, False))

Leaves = Mapping[str, torch.Tensor]
# members that share an input, the input, the recipe, what was proved, counts -> their outputs
Swapped = Callable[[list[nn.Module], torch.Tensor, Recipe, Proven, Counts], list[torch.Tensor]]


def experiment(
    form: Any, layers: Sequence[Any], key: CallKey, recipe: Recipe, implementation: str, swapped: Swapped
) -> Experiment:
    """The linears `layers` (those of the form's groups in order, or one alone) by one recipe and implementation."""
    device, x_type, weight_type, autocast, low = key
    inputs = {name: tensor.to(device) for name, tensor in _draw(form, low is not None).items()}
    numbers, state = inputs["x"].device, generator_state(inputs["x"].device)
    dtype = (x_type if x_type in LOW_PRECISION else torch.bfloat16) if autocast else None

    def ours(leaves: Leaves) -> torch.Tensor:
        outputs, counts = [], Counts()
        with generator_at(state, numbers):
            for dropout, noted, trains in WAYS:
                members = _members(form, layers, leaves, dropout, trains)
                outputs += swapped(members, _input(leaves["x"], noted), recipe, {key: implementation}, counts)
        if counts.fused["fp8"] != len(WAYS):
            raise RuntimeError(f"the swapped linears did not take the fused path: {dict(counts.passed_on)}")
        return total(outputs)

    def definition(leaves: Leaves) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        with generator_at(state, numbers):
            for dropout, _, trains in WAYS:
                outputs += _defined(form, leaves, recipe, dropout, trains, low, dtype)
        return total(outputs)

    dtypes = {name: low if name[0] in "ab" and name[1:].isdigit() else weight_type for name in inputs}
    return Experiment(
        inputs=inputs,
        dtypes={**dtypes, "x": x_type},
        theirs=definition,
        ours=ours,
        truth=definition,
        autocast=dtype,
    )


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
    form: Any,
    leaves: Leaves,
    recipe: Recipe,
    dropout: float,
    trains: bool,
    low: torch.dtype | None,
    autocast: torch.dtype | None,
) -> list[torch.Tensor]:
    x, numbers, formats = leaves["x"], range(len(form.biases)), formats_here()
    is_truth = x.dtype is torch.float64
    weights = [leaves[f"weight{i}"] if trains else leaves[f"weight{i}"].detach() for i in numbers]
    gradients = formats.e5m2 if recipe.wide_gradients else formats.e4m3
    biases = [leaves.get(f"bias{i}") for i in numbers]
    products = reference.fp8_linears(x, weights, biases, recipe.rowwise, formats.e4m3, gradients)
    outputs = [product if is_truth or autocast is None else product.to(autocast) for product in products]
    adapted = [i for i in numbers if f"a{i}" in leaves]
    like = x.detach().to(low if autocast is None else autocast) if adapted else x
    masks = [draw_mask(like, dropout) if dropout else None for _ in adapted]
    for i, mask in zip(adapted, masks, strict=True):
        adapter = Adapter(leaves[f"a{i}"], leaves[f"b{i}"], Form(SCALE, dropout))
        outputs[i] = outputs[i] + low_rank(x, adapter, mask).to(outputs[i].dtype)
    return outputs


def _input(x: torch.Tensor, noted: bool) -> torch.Tensor:
    if not noted:
        return x
    x = x * 1
    remember(x, lambda source: source * 1, x)
    return x


def _draw(form: Any, adapters: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, most: float = 1.0, steps: int = 1) -> torch.Tensor:
        return torch.randint(-steps, steps + 1, shape, generator=generator, dtype=torch.float64) * (most / steps)

    drawn = {"x": draw(2, 3, SIZES[0], most=20 / 16, steps=20)}  # of 5 bits: 8-bit values hold 4
    for i, (has_bias, adapted) in enumerate(zip(form.biases, form.adapted, strict=True)):
        width = SIZES[1 + i % (len(SIZES) - 1)]
        drawn[f"weight{i}"] = draw(width, SIZES[0], most=0.5, steps=2)
        if has_bias:
            drawn[f"bias{i}"] = draw(width, steps=2)
        if adapters and adapted:
            drawn[f"a{i}"], drawn[f"b{i}"] = draw(RANK, SIZES[0]), draw(width, RANK, most=0.5)
    return drawn


def _members(form: Any, layers: Sequence[Any], leaves: Leaves, dropout: float, trains: bool) -> list[nn.Module]:
    """Linears with these tensors, and around them the class of each layer that is adapted, where there are adapters."""
    members: list[nn.Module] = []
    for i, layer in enumerate(layers):
        weight = leaves[f"weight{i}"]
        weight = weight if trains else nn.Parameter(weight.detach().clone(), requires_grad=False)
        member: nn.Module = linear_of(weight, leaves.get(f"bias{i}"))
        if f"a{i}" in leaves:
            parts = leaves[f"a{i}"], leaves[f"b{i}"], nn.Dropout(dropout), SCALE
            member = lora.example(layer, member, *parts)  # type: ignore[arg-type]
        members.append(member)
    return members
