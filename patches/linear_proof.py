"""How swapped linears are proved: narrow ones of one input, as they are and swapped, in each way in which a call can be computed.

Adapters have no dropout first and some then: by the random numbers that PEFT's own dropout takes, or where others are drawn (by
Triton, and on a GPU) with these masks put in the place of PEFT's dropout. All values and their sums are few multiples of a power
of 2, which every dtype holds: on so few elements it would be chance whose rounding is nearer to the truth.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from automodel_accel.kernels import room
from automodel_accel.kernels.linear import reference
from automodel_accel.kernels.lora import Adapter, Form, draw_mask, generator_at, generator_state, masks_are_torchs
from automodel_accel.kernels.recompute import remember
from automodel_accel.patches import columns, lora
from automodel_accel.patches.contract import CallKey, Counts, Experiment, Proven
from automodel_accel.patches.probe import linear_of

TRITON = "triton"
SIZES = (16, 10, 14, 6)  # of the input and, by turns, of the outputs
ROOM = 64  # columns: of more adapters of that rank than linears share an input
RANK, SCALE = 4, 0.5
LOW_PRECISION = (torch.bfloat16, torch.float16)

Leaves = Mapping[str, torch.Tensor]
# members that share an input, the input, what was proved, counts -> their outputs
Swapped = Callable[[list[nn.Module], torch.Tensor, Proven, Counts], list[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Way:
    """One way in which a call is computed.

    Attributes:
        dropout: Of the adapters.
        noted: From an input with a source.
        frozen: Of weights that do not train.
        wide: Of weights with columns beside them, from an input with room.
    """

    dropout: float
    noted: bool = False
    frozen: bool = False
    wide: bool = False


PLAIN, NOTED, WIDE = Way(0.0), Way(0.5, noted=True), Way(0.5, frozen=True, wide=True)


def experiment(form: Any, layers: Sequence[Any], key: CallKey, implementation: str, swapped: Swapped) -> Experiment:
    """The linears `layers` (those of the form's groups in order, or one alone) by one implementation."""
    device, x_type, _, autocast, low = key
    inputs = {name: tensor.to(device) for name, tensor in draw_leaves(form, low is not None, SIZES).items()}
    numbers, state = inputs["x"].device, generator_state(inputs["x"].device)
    in_triton = implementation == TRITON and low is not None and (autocast or low is x_type)
    ways = (PLAIN, NOTED, WIDE) if in_triton and weight_is_computed(key) else (PLAIN, NOTED)

    def theirs(leaves: Leaves) -> torch.Tensor:
        drawn, outputs = _masks(form, ways, key, in_triton, leaves["x"].detach(), state), []
        with generator_at(state, numbers):
            for way, masks in zip(ways, drawn, strict=True):
                dropouts = [
                    nn.Dropout(way.dropout) if mask is None else lora.Given(mask, way.dropout) for mask in masks
                ]
                outputs += [member(leaves["x"]) for member in members_of(form, layers, leaves, way, dropouts)]
            return total(outputs)

    def ours(leaves: Leaves) -> torch.Tensor:
        counts = Counts()
        with generator_at(state, numbers):
            outputs = [output for way in ways for output in run(way, leaves, counts)]
        if counts.fused["linear"] != (len(ways) if len(form.biases) > 1 or low else 1):
            raise RuntimeError(f"the swapped linears did not take the fused path: {dict(counts.passed_on)}")
        return total(outputs)

    def run(way: Way, leaves: Leaves, counts: Counts) -> list[torch.Tensor]:
        members = members_of(form, layers, leaves, way, [nn.Dropout(way.dropout)] * len(form.biases))
        adapted = [member for member in members if lora.is_adapted(member)]
        for member in adapted if way.wide else ():
            columns.allow(member, None)
        outputs = swapped(members, input_of(leaves["x"], way), {key: implementation}, counts)
        if way.wide and not all(columns.has_columns(member) for member in adapted):
            raise RuntimeError("the swapped linears have no columns for their adapters")
        return outputs

    def truth(leaves: Leaves) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        drawn = _masks(form, ways, key, in_triton, leaves["x"].detach(), state)
        with generator_at(state, numbers):
            for way, given in zip(ways, drawn, strict=True):
                weights, biases = parameters_of(form, leaves, way)
                adapters = [adapter_of(leaves, i, way.dropout) for i in range(len(form.biases))]
                masks = [
                    draw_mask(leaves["x"].to(low), way.dropout) if adapter and mask is None else mask
                    for adapter, mask in zip(adapters, given, strict=True)
                ]
                outputs += reference.linears(leaves["x"], weights, biases, adapters=adapters, masks=masks)
        return total(outputs)

    return Experiment(
        inputs=inputs,
        dtypes=dtypes_of(inputs, key),
        theirs=theirs,
        ours=ours,
        truth=truth,
        autocast=autocast_of(key),
    )


def dtypes_of(inputs: Leaves, key: CallKey) -> dict[str, torch.dtype]:
    """Of the input, of the linears' tensors and of the adapters'."""
    _, x_type, weight_type, _, low = key
    dtypes = {name: low if name[0] in "ab" and name[1:].isdigit() else weight_type for name in inputs}
    return {**dtypes, "x": x_type}


def autocast_of(key: CallKey) -> torch.dtype | None:
    """Dtype of the autocast region around a call, or None."""
    _, x_type, _, autocast, _ = key
    return (x_type if x_type in LOW_PRECISION else torch.bfloat16) if autocast else None


def weight_is_computed(key: CallKey) -> bool:
    """Whether the weights are in the dtype in which products and adapters are computed, so that B can stand beside them."""
    device, x, weight, autocast, low = key
    return weight is (torch.get_autocast_dtype(device) if autocast else x) and (autocast or low is weight)


def _masks(
    form: Any, ways: Sequence[Way], key: CallKey, in_triton: bool, x: torch.Tensor, state: torch.Tensor
) -> list[list[torch.Tensor | None]]:
    """For each way and each linear the mask that will be drawn; None where it is PEFT's own as well, or there is none."""
    if key[-1] is None or (not in_triton and masks_are_torchs(x.device)):
        return [[None] * len(form.biases) for _ in ways]
    draw = _triton_masks if in_triton else _torch_masks
    with generator_at(state, x.device):
        drawn = [iter(draw(form, way.dropout, key, x) if way.dropout else []) for way in ways]
    return [[next(of_way, None) if adapted else None for adapted in form.adapted] for of_way in drawn]


def _triton_masks(form: Any, dropout: float, key: CallKey, x: torch.Tensor) -> list[torch.Tensor]:
    from automodel_accel.kernels.lora import fused  # needs Triton

    seed = fused.draw_seed(x.device)
    return [fused.mask(x, lot, dropout, seed) for lot in range(sum(form.adapted))]


def _torch_masks(form: Any, dropout: float, key: CallKey, x: torch.Tensor) -> list[torch.Tensor]:
    device, _, _, autocast, low = key
    dtype = torch.get_autocast_dtype(device) if autocast else low
    return [draw_mask(x.to(dtype), dropout) for _ in range(sum(form.adapted))]


def total(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """A scalar that every element is in, by a weight of -1, 0 or 1, in the dtype of the outputs."""
    joined = torch.cat([output.flatten() for output in outputs])
    weights = torch.randint(-1, 2, joined.shape, generator=torch.Generator().manual_seed(1)).to(joined)
    return (joined * weights).sum(dtype=torch.promote_types(joined.dtype, torch.float32)).to(joined.dtype)


def draw_leaves(form: Any, adapters: bool, sizes: Sequence[int], x_steps: int = 1) -> dict[str, torch.Tensor]:
    """The input, in so many steps of a power of 2 up or down, and the tensors of linears of these sizes, by name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, most: float = 1.0, steps: int = 1) -> torch.Tensor:
        return torch.randint(-steps, steps + 1, shape, generator=generator, dtype=torch.float64) * (most / steps)

    step = 2.0 ** -(x_steps - 1).bit_length()
    drawn = {"x": draw(2, 3, sizes[0], most=x_steps * step, steps=x_steps)}
    for i, (has_bias, adapted) in enumerate(zip(form.biases, form.adapted, strict=True)):
        width = sizes[1 + i % (len(sizes) - 1)]
        drawn[f"weight{i}"] = draw(width, sizes[0], most=0.5, steps=2)
        if has_bias:
            drawn[f"bias{i}"] = draw(width, steps=2)
        if adapters and adapted:
            drawn[f"a{i}"], drawn[f"b{i}"] = draw(RANK, sizes[0]), draw(width, RANK, most=0.5)
    return drawn


def parameters_of(form: Any, leaves: Leaves, way: Way) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """The weights and the biases."""
    numbers = range(len(form.biases))
    weights = [leaves[f"weight{i}"] for i in numbers]
    if way.frozen:
        weights = [nn.Parameter(weight.detach().clone(), requires_grad=False) for weight in weights]
    return weights, [leaves.get(f"bias{i}") for i in numbers]


def input_of(x: torch.Tensor, way: Way) -> torch.Tensor:
    """x, or the same values with what the way asks for noted on them."""
    if way.noted:
        x = x * 1
        remember(x, lambda source: source * 1, x)
    if way.wide:
        x = F.pad(x, (0, ROOM))[..., : x.shape[-1]]
        room.mark(x)
    return x


def adapter_of(leaves: Leaves, i: int, dropout: float) -> Adapter | None:
    """That of one linear, or None."""
    return Adapter(leaves[f"a{i}"], leaves[f"b{i}"], Form(SCALE, dropout)) if f"a{i}" in leaves else None


def members_of(
    form: Any, layers: Sequence[Any], leaves: Leaves, way: Way, dropouts: Sequence[nn.Module]
) -> list[nn.Module]:
    """Linears with these tensors, and around them the class of each layer that is adapted, where there are adapters."""
    bases = [linear_of(weight, bias) for weight, bias in zip(*parameters_of(form, leaves, way), strict=True)]
    return [
        lora.example(layer, base, leaves[f"a{i}"], leaves[f"b{i}"], dropouts[i], SCALE) if f"a{i}" in leaves else base
        for i, (layer, base) in enumerate(zip(layers, bases, strict=True))
    ]
