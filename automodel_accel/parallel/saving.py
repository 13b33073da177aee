"""`save_pretrained` of a model that is spread: the weights are gathered, and the first rank writes them."""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from automodel_accel.parallel.wrap import root_of
from automodel_accel.patches.contract import Counts
from automodel_accel.patches.retype import retype

METHOD = "save_pretrained"


def save_whole(model: nn.Module, counts: Counts) -> None:
    """Let `save_pretrained`, called on all ranks, write what it writes for a model that is not spread."""
    for module in {id(module): module for module in (model, root_of(model))}.values():
        if hasattr(type(module), METHOD):
            retype(module, {METHOD: _gathering(getattr(type(module), METHOD))}, counts)


def _gathering(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(self: nn.Module, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise ValueError(f"{METHOD} of a model that is spread over processes takes its settings by name.")
        if kwargs.get("state_dict") is not None:  # whoever has gathered it says who writes, and may be alone here
            return original(self, save_directory, **kwargs)
        first = dist.get_rank() == 0
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        # PEFT and transformers gather nothing of a state_dict that is given
        kwargs |= {"state_dict": get_model_state_dict(self, options=options), "is_main_process": first}
        result = original(self, save_directory, **kwargs) if first else None
        dist.barrier()
        return result

    return save_pretrained
