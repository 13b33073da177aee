"""What a model's output head is made of: one linear, or linears inside of an adapter's modules.

PEFT wraps a head in two ways, which are known by their attributes: a tuner layer has a `base_layer` (and `lora_B`, one linear
per LoRA adapter), a wrapper for `modules_to_save` has an `original_module` and copies of it. Their own forwards decide what is
added, merged or switched off.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from automodel_accel.kernels.contract import Refusal
from automodel_accel.patches.probe import PROBE_ERRORS
from automodel_accel.patches.retype import MODEL, changed_by_accelerator, forward_replaced, is_retyped

LOGITS_STAY = "the model's own loss stays, with its logits"
LABELS = ("labels", "targets", "target")


def labels_parameter(forward: Callable[..., Any]) -> str | None:
    """Under which name a forward takes labels: as a parameter, or, where it passes on what it does not know, as a keyword."""
    parameters = inspect.signature(forward).parameters
    named = (name for name in LABELS if name in parameters)
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return next(named, LABELS[0] if passes_on else None)


def output_head(module: nn.Module) -> Any:
    """The model's output embeddings: those that it names, else the only linear as long as an embedding's vocabulary; or None."""
    named = named_head(module)
    return named if named is not None else _head_by_length(module)


def _head_by_length(module: nn.Module) -> nn.Module | None:
    """In a model that takes labels and says nothing of its head."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or not set(LABELS).intersection(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]):
        return None
    if any(named_head(child) is not None for child in module.modules()):
        return None  # the model inside is asked itself
    vocabularies = {child.num_embeddings for child in module.modules() if isinstance(child, nn.Embedding)}
    linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
    heads = [linear for linear in linears if linear.out_features in vocabularies]
    return heads[0] if len(heads) == 1 else None


def named_head(module: nn.Module) -> Any:
    """What the model says is its output embeddings, or None."""
    if not hasattr(type(module), "get_output_embeddings"):
        return None
    try:
        return module.get_output_embeddings()  # type: ignore[operator]
    except PROBE_ERRORS:  # a composite model may not say which of its heads it is
        return None


def base_linear(head: nn.Module) -> nn.Module:
    """The head itself, or the module that the adapters around it were built on."""
    inner = _children(head)
    for name in ("base_layer", "original_module"):
        if name in inner:
            return base_linear(inner[name])
    return head


def linears_of(head: nn.Module) -> list[nn.Module]:
    """The modules whose products are the head's logits, or are summed up to them; the base first."""
    return [base_linear(head), *_beside_base(head)]


def _beside_base(head: nn.Module) -> Iterator[nn.Module]:
    inner = _children(head)
    for name in ("base_layer", "original_module"):
        if name in inner:
            yield from _beside_base(inner[name])
    for copy in _children(inner.get("modules_to_save")).values():
        yield from linears_of(copy)
    yield from _children(inner.get("lora_B")).values()


def _children(module: nn.Module | None) -> dict[str, nn.Module]:
    return {} if module is None else dict(module.named_children())


def objection(path: str, linear: nn.Module) -> Refusal | None:
    """Why this module cannot give lazy logits, or None."""
    changed = changed_by_accelerator(path, linear) or forward_replaced(path, linear)
    if changed is not None:
        return changed
    place = path or MODEL
    if is_retyped(linear) or not is_plain_linear(linear):
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        return Refusal(
            place, f"the output head is a {kind}, expected a torch.nn.Linear with its own forward", LOGITS_STAY
        )
    weight: Any = linear.weight
    if hasattr(weight, "device_mesh"):
        return Refusal(
            place,
            "the head's weight is a DTensor: sharded",
            f"{LOGITS_STAY}; apply before fully_shard, and before a head is cut, to fuse it",
        )
    if type(weight) not in (nn.Parameter, torch.Tensor):
        return Refusal(place, f"the head's weight is a {type(weight).__name__}: quantised", LOGITS_STAY)
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return Refusal(place, f"the head's weight is {weight.dtype}: quantised", LOGITS_STAY)
    return None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it computes what torch's linear computes."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and "forward" not in vars(module)


def drops_weights(head: nn.Module) -> bool:
    """Whether FSDP2 frees weights of an adapted head after the head's forward: the loss comes later, and reads them."""
    return any(_reshards(module) for module in head.modules() if not isinstance(module, nn.Linear))


def is_dropped_with_others(linear: nn.Module) -> bool:
    """Whether FSDP2 frees the weight after the forward, in one unit with other modules.

    The loss would have to call the linear, and so the unit, a second time: its backward would then free the others' weights early.
    """
    state = _fsdp_state(linear)
    return state is not None and len(state._modules) > 1 and _reshards(linear)


def _reshards(module: nn.Module) -> bool:
    state = _fsdp_state(module)
    if state is None:
        return False
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return any(group is not None and group.post_forward_mesh_info is not None for group in groups)


def _fsdp_state(module: nn.Module) -> Any:
    # asked of the class: a wrapper of PEFT's passes unknown attributes on to the module in it
    return module._get_fsdp_state() if hasattr(type(module), "_get_fsdp_state") else None  # type: ignore[operator]
