"""QLoRA: PEFT's LoRA layers around the linears that a library quantised: its own product, and what is added to it by us.

Served: the 4-bit and 8-bit linears of bitsandbytes, and transformers' FP8 linears (checkpoints in blocks of 8-bit floats).

The base stays the library's own, dequantised by it in its own matrix product. What the adapters of one input add to the products is
computed in one node of autograd (kernels/lora/beside.py), in the memory of the products. Groups that share an input are found
and shared as plain linears are (linear.py); each call that is no sum of a product and one low-rank product goes to PEFT (lora.py).
"""

import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from automodel_accel.kernels.contract import Refusal
from automodel_accel.kernels.facts import Facts
from automodel_accel.kernels.lora import (
    Adapter,
    Form,
    draw_mask,
    generator_at,
    generator_state,
    masks_are_torchs,
    reference,
)
from automodel_accel.kernels.lora.beside import KERNEL, beside
from automodel_accel.kernels.recompute import region, remember, source_of
from automodel_accel.patches import lora
from automodel_accel.patches.contract import CallKey, Claim, Context, Counts, Experiment, Proven
from automodel_accel.patches.linear import (
    LOW_PRECISION,
    SHARED,
    LinearPatch,
    Shared,
    Sharing,
    is_served,
    parent_forward,
)
from automodel_accel.patches.probe import linear_of
from automodel_accel.patches.retype import original_class, retype

LIBRARY = "bitsandbytes"
FP8_LINEARS = "transformers.integrations.finegrained_fp8"
PEFTS = "peft.tuners.lora."  # where PEFT's layers are, those of one library in one module
KINDS = {"Linear4bit": "4-bit", "Linear8bitLt": "8-bit"}  # PEFT's class, and the library's that it is around
FP8 = "fp8"
KEEPS_X = ("8-bit",)  # the library's own product keeps the input
# module of PEFT's layers -> the library that quantised what they are around
OTHERS = {
    **{"aqlm": "AQLM", "awq": "AWQ", "eetq": "EETQ", "gptq": "GPTQ", "hqq": "HQQ", "inc": "Intel Neural Compressor"},
    "torchao": "torchao",
}
SIZES = (16, 10, 14, 6)  # of the input and, by turns, of the outputs in a proof
RANK, SCALE, DROPOUTS = 4, 0.5, (0.0, 0.5)  # of the adapters in a proof

Leaves = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class QuantisedForm:
    """What was recognised.

    Attributes:
        kind: Of the weights: "4-bit", "8-bit" (integers) or "fp8".
        groups: Names of the children that share an input, for each input; empty for a layer on its own.
        count: How many layers these are.
        recompute: Whether a source is saved in place of an input. Never where the library keeps the input itself.
    """

    kind: str
    groups: tuple[tuple[str, ...], ...]
    count: int
    recompute: bool

    def label(self) -> str:
        """For the plan."""
        said = ["; ".join(f"{', '.join(names)} of one input" for names in self.groups)] if self.groups else []
        again = ["the input computed again in backward, where that is cheap"] if self.recompute else []
        return ", ".join([*said, f"LoRA on {self.kind}", *again])


class QuantisedPatch(LinearPatch):
    """Matches, proves and swaps LoRA layers around quantised linears."""

    fusion = "quantised"
    kernel = KERNEL

    def match(self, path: str, module: nn.Module, context: Context) -> Claim | Refusal | None:
        """Recognise a module with such layers of one input, or such a layer; refuse those around other quantised linears."""
        if path == "":
            self._paths = {id(child): name for name, child in module.named_modules()}
            self._taken = {id(child) for name, child in module.named_modules() if name in context.taken}  # heads
        if isinstance(module, LoraLayer):
            if (reason := _reason_against(module, context.facts)) is not None:
                return Refusal(path, reason, "PEFT's own forward stays")
            return self._claim_layers((), [module], [], context) if kind_of(module) and self._is_free(module) else None
        if "forward" in vars(module) or not any(map(kind_of, module._modules.values())):
            return None
        names_of_groups = [self._alike(module, names, context.facts) for names in self._read(module)]
        groups = tuple(names for names in names_of_groups if len(names) > 1)
        members = [module._modules[name] for names in groups for name in names]
        self._taken.update(map(id, members))
        return self._claim_layers(groups, members, [module], context) if groups else None

    def _alike(self, module: nn.Module, names: tuple[str, ...], facts: Facts) -> tuple[str, ...]:
        """Those that are such layers, of one kind and width, and not taken."""
        children: dict[str, Any] = {name: module._modules.get(name) for name in names}
        found = {
            name: child for name, child in children.items() if kind_of(child) and not _reason_against(child, facts)
        }
        kinds = {(kind_of(child), child.in_features) for child in found.values()}
        return tuple(found) if len(kinds) == 1 and all(map(self._is_free, found.values())) else ()

    def _claim_layers(
        self, groups: tuple[tuple[str, ...], ...], members: Sequence[Any], parents: Sequence[Any], context: Context
    ) -> Claim | None:
        """Its dtype is that of the adapters: the base has one only while it computes."""
        dtypes = {a.weight.dtype for member in members for a in member.lora_A.values()}
        kind = kind_of(members[0])
        if len(dtypes) != 1 or kind is None:
            return None
        (dtype,) = dtypes
        form = QuantisedForm(kind, groups, len(members), context.recompute is not None and kind not in KEEPS_X)
        paths = tuple(self._paths[id(module)] for module in (*members, *parents))
        choices = context.choices(KERNEL, dtype, members[0].in_features)
        return Claim(self.fusion, paths, form.label(), dtype, form, choices, part="quantised linear")

    def keys(self, claim: Claim, device: str) -> list[CallKey]:
        """(device, dtype of the input, autocast, of the adapters): first an input in the adapters' dtype, then others."""
        dtype, wide = claim.dtype, torch.float32
        low = dtype if dtype in LOW_PRECISION else torch.bfloat16
        inputs = dict.fromkeys((dtype, wide, low, torch.float16))
        keys = [(device, x, False, adapter) for x in inputs for adapter in dict.fromkeys((x, wide, dtype))]
        keys += [(device, x, True, wide) for x in inputs if x is not torch.float64]
        return keys

    def experiment(self, claim: Claim, module: nn.Module, key: CallKey, implementation: str) -> Experiment:
        """PEFT's class around a stand-in for the base, as it is and swapped: in one group, then again from an input with a source.

        The stand-in is a linear with weights in the input's dtype: what the library computes is called, and not replaced. Adapters
        have no dropout first and some then, by the same random numbers. All values and their sums are few multiples of a power
        of 2, which every dtype holds: on so few elements it would be chance whose rounding is nearer to the truth.
        """
        form: QuantisedForm = claim.form  # type: ignore[assignment]
        device, x_type, autocast, low = key
        inputs = {name: tensor.to(device) for name, tensor in _draw(form.count).items()}
        layers = [module._modules[name] for names in form.groups for name in names] if form.groups else [module]
        numbers, start = inputs["x"].device, generator_state(inputs["x"].device)

        def masks(leaves: Leaves, dropout: float) -> list[torch.Tensor]:
            return [draw_mask(leaves["x"].detach().to(low), dropout) for _ in layers]

        def theirs(leaves: Leaves) -> torch.Tensor:
            outputs: list[torch.Tensor] = []
            with generator_at(start, numbers):
                for p in DROPOUTS:
                    # PEFT's own dropout where it draws the same masks
                    given = p and not masks_are_torchs(numbers)
                    drop = (
                        [lora.Given(mask, p) for mask in masks(leaves, p)] if given else [nn.Dropout(p) for _ in layers]
                    )
                    outputs += [member(leaves["x"]) for member in _examples(layers, leaves, drop)]
            return _total(outputs)

        def ours(leaves: Leaves) -> torch.Tensor:
            noted = leaves["x"] * 1
            remember(noted, lambda x: x * 1, leaves["x"])
            outputs, counts = [], Counts()
            with generator_at(start, numbers):
                for dropout, x in zip(DROPOUTS, (leaves["x"], noted), strict=True):
                    members = _examples(layers, leaves, [nn.Dropout(dropout) for _ in layers])
                    outputs += _swapped_outputs(members, x, {key: implementation}, counts)
            if counts.fused[self.fusion] != len(DROPOUTS):
                raise RuntimeError(f"the swapped layers did not take the fused path: {dict(counts.passed_on)}")
            return _total(outputs)

        def truth(leaves: Leaves) -> torch.Tensor:
            outputs: list[torch.Tensor] = []
            x, products = leaves["x"], [leaves["x"] @ leaves[f"weight{i}"].t() for i in range(form.count)]
            with generator_at(start, numbers):
                for dropout in DROPOUTS:
                    pairs = [(leaves[f"a{i}"], leaves[f"b{i}"]) for i in range(form.count)]
                    adapters = [Adapter(*pair, Form(SCALE, dropout)) for pair in pairs]
                    outputs += reference.beside(x, products, adapters, masks=masks(leaves, dropout))
            return _total(outputs)

        return Experiment(
            inputs=inputs,
            dtypes={name: low if name[0] in "ab" else x_type for name in inputs},
            theirs=theirs,
            ours=ours,
            truth=truth,
            autocast=(x_type if x_type in LOW_PRECISION else torch.bfloat16) if autocast else None,
        )

    def swap(self, claim: Claim, modules: list[nn.Module], proven: Proven, counts: Counts) -> None:
        """Re-type the layers, and the module whose forward they share."""
        form: QuantisedForm = claim.form  # type: ignore[assignment]
        for member in modules[: form.count]:
            retype(member, {"forward": _member_forward(type(member).forward, form.recompute, proven, counts)}, counts)
        for parent in modules[form.count :]:
            retype(parent, {"forward": parent_forward(type(parent).forward, form.groups)}, counts)


def kind_of(module: Any) -> str | None:
    """Of the weights in PEFT's layer around a linear of a library that is served; None for any other module.

    By the classes themselves. Neither a library nor PEFT's layers for it are imported: where they were not, there is none.
    """
    if not isinstance(module, LoraLayer):
        return None
    kind, base = original_class(module), original_class(module.base_layer)  # type: ignore[arg-type]
    if kind is LoraLinear:
        return FP8 if base is getattr(sys.modules.get(FP8_LINEARS), "FP8Linear", None) else None
    layers, library = sys.modules.get(f"{PEFTS}bnb"), sys.modules.get(f"{LIBRARY}.nn")
    is_theirs = kind is getattr(layers, kind.__name__, None) and base is getattr(library, kind.__name__, None)
    return KINDS.get(kind.__name__) if is_theirs else None


def _reason_against(layer: Any, facts: Facts) -> str | None:
    """Why a LoRA layer around a quantised linear is not served; None where it is, and for one around a plain linear."""
    folder, _, of = original_class(layer).__module__.rpartition(".")
    if f"{folder}." != PEFTS:
        return None
    if (other := OTHERS.get(of)) is not None:
        return f"its base is quantised by {other}; LoRA is computed beside the 4-bit and 8-bit linears of {LIBRARY}"
    if of != "bnb" or (kind_of(layer) and facts.has(LIBRARY)):
        return None
    if not facts.has(LIBRARY):
        return f"its base is quantised by {LIBRARY}, which is not installed; pip install {LIBRARY}"
    return f"its base is a {original_class(layer.base_layer).__name__}, not the linear of {LIBRARY} that PEFT's layer is for"


def _member_forward(
    original: Callable[..., Any], recompute: bool, proven: Proven, counts: Counts
) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_served(self, args, kwargs, in_triton=False):
            return original(self, *args, **kwargs)
        x: torch.Tensor = args[0]
        shared: Shared | None = vars(self).get(SHARED)
        shared = shared if shared is not None and shared.region == region() else None
        if shared is not None and (output := shared.take(self, x)) is not None:
            return output
        if not self.training:
            return original(self, x)  # an evaluation gives PEFT's bits
        if (reason := lora.objection(self)) is not None:
            counts.count(counts.passed_on, f"quantised: LoRA by PEFT: {reason}")
            return original(self, x)
        key = _call_key(self, x)
        implementation = proven.get(key)
        if implementation is None:
            counts.count(counts.passed_on, f"quantised: not proved for {key}")
            return original(self, x)
        counts.count(counts.fused, QuantisedPatch.fusion)
        members = [self, *_going_along(self, shared, x, key)]
        output, *rest = beside(
            x,
            [member.base_layer(x) for member in members],
            list(map(lora.adapter_of, members)),
            given_away=True,
            source=source_of(x) if recompute else None,
            implementation=implementation,
        )
        if shared is not None:
            shared.keep(members[1:], x, rest)
        return output

    return forward


def _going_along(layer: Any, shared: Shared | None, x: torch.Tensor, key: CallKey) -> list[Any]:
    """Those behind the layer that are computed in the same call; up to one that is not, for random numbers are drawn in order."""
    if shared is None:
        return []
    behind = shared.behind(layer)
    alike = (other.training and lora.objection(other) is None and _call_key(other, x) == key for other in behind)
    return [other for other, _ in itertools.takewhile(lambda pair: pair[1], zip(behind, alike, strict=True))]


def _call_key(layer: Any, x: torch.Tensor) -> CallKey:
    """What decides whether a call was proved; None first where x and what autocast computes are of two narrow dtypes."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return kind, x.dtype, False, lora.dtype_of_adapter(layer)
    dtype = torch.get_autocast_dtype(kind)
    apart = x.dtype in LOW_PRECISION and dtype is not x.dtype
    return (None, f"{x.dtype} under autocast to {dtype}") if apart else (kind, x.dtype, True, torch.float32)


def _swapped_outputs(members: list[nn.Module], x: torch.Tensor, proven: Proven, counts: Counts) -> list[torch.Tensor]:
    """What each of them gives, swapped and in one group."""
    names = tuple(map(str, range(len(members))))
    for member in members:
        retype(member, {"forward": _member_forward(type(member).forward, True, proven, counts)}, None)
    with Sharing(dict(zip(names, members, strict=True)), (names,)):
        return [member(x) for member in members]


def _draw(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, most: float = 1.0, steps: int = 1) -> torch.Tensor:
        return torch.randint(-steps, steps + 1, shape, generator=generator, dtype=torch.float64) * (most / steps)

    drawn = {"x": draw(2, 3, SIZES[0])}
    for i in range(count):
        width = SIZES[1 + i % (len(SIZES) - 1)]
        drawn[f"weight{i}"] = draw(width, SIZES[0], most=0.5, steps=2)
        drawn[f"a{i}"], drawn[f"b{i}"] = draw(RANK, SIZES[0]), draw(width, RANK, most=0.5)
    return drawn


def _examples(layers: Sequence[Any], leaves: Leaves, dropouts: Sequence[nn.Module]) -> list[nn.Module]:
    """Layers of PEFT's class around linears with these tensors."""
    return [
        lora.example(layer, linear_of(leaves[f"weight{i}"], None), leaves[f"a{i}"], leaves[f"b{i}"], dropouts[i], SCALE)
        for i, layer in enumerate(layers)
    ]


def _total(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """A scalar that every element is in, by a weight of -1, 0 or 1, in the dtype of the outputs."""
    joined = torch.cat([output.flatten() for output in outputs])
    weights = torch.randint(-1, 2, joined.shape, generator=torch.Generator().manual_seed(1)).to(joined)
    return (joined * weights).sum(dtype=torch.promote_types(joined.dtype, torch.float32)).to(joined.dtype)
