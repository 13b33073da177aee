"""Whole layers computed again in backward: transformers' own checkpointing, switched on by re-typing, so that `revert` undoes it."""

import functools

import torch.utils.checkpoint
from torch import nn

from automodel_accel.kernels.contract import Refusal
from automodel_accel.patches.contract import Counts
from automodel_accel.patches.retype import retype

FUNCTION = "_gradient_checkpointing_func"


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers can compute again; empty where there are none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not getattr(model, "supports_gradient_checkpointing", True):
        return []
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def no_layers(model: nn.Module) -> Refusal | None:
    """Why whole layers of this model cannot be computed again, or None."""
    if checkpointed_layers(model):
        return None
    reason = "no layer of this model is one that transformers can compute again in backward"
    return Refusal("recompute='full'", reason, 'none is; ask for recompute="mlp"')


def checkpoint_layer(layer: nn.Module, counts: Counts) -> None:
    """Compute the layer again in backward; `gradient_checkpointing_enable` and `_disable` go on working."""
    function = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    retype(layer, {"gradient_checkpointing": True, FUNCTION: function}, counts)  # type: ignore[dict-item]
