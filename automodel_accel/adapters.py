"""LoRA by one argument of `apply`: PEFT's own adapters, with targets that are checked before anything is changed."""

import fnmatch
from collections.abc import Iterable
from typing import Any

import peft
from torch import nn

from automodel_accel.kernels.contract import unknown_name

WILDCARDS = frozenset("*?[")


def with_lora(model: nn.Module, config: "peft.LoraConfig | dict[str, Any]") -> peft.PeftModel:
    """`peft.get_peft_model`, for which target_modules may hold wildcards.

    Args:
        model: Without adapters. It is changed in place, as by PEFT; `unload()` of what is returned undoes it.
        config: PEFT's, or a dict of its fields. A target such as "*_proj" stands for all linears whose last name matches; one
            with dots is matched against whole names.

    Raises:
        ValueError: the model has adapters, a target matches nothing (with the nearest names), or the rank is larger than a layer.
            The model is left as it was.
    """
    config = peft.LoraConfig(**config) if isinstance(config, dict) else config
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"lora is a {type(config).__name__}; expected a peft.LoraConfig or a dict of its fields.")
    if isinstance(model, peft.PeftModel) or hasattr(model, "peft_config"):
        raise ValueError(
            f"this {type(model).__name__} has adapters already; leave lora out, or add another one by model.add_adapter."
        )
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = config.target_modules
    if isinstance(targets, str) and targets[:1] == "*":
        targets = [targets]  # no regular expression begins so
    if isinstance(targets, list | set | tuple):
        config.target_modules = sorted(_expanded(targets, model, linears))
        _check_rank(config, linears)
    return peft.get_peft_model(model, config)


def _expanded(targets: Iterable[str], model: nn.Module, linears: dict[str, nn.Linear]) -> set[str]:
    found: set[str] = set()
    for target in targets:
        if WILDCARDS.isdisjoint(target):
            matches = {target} if any(_ends_in(name, target) for name, _ in model.named_modules()) else set()
        elif "." in target:
            matches = {name for name in linears if fnmatch.fnmatchcase(name, target)}
        else:
            matches = {last for name in linears if fnmatch.fnmatchcase(last := name.rpartition(".")[2], target)}
        if not matches:
            known = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(f"lora: {unknown_name('target module', target, known)}")
        found |= matches
    return found


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _check_rank(config: "peft.LoraConfig", linears: dict[str, nn.Linear]) -> None:
    for name, linear in linears.items():
        if config.target_modules is None or not any(_ends_in(name, target) for target in config.target_modules):
            continue
        most = min(linear.in_features, linear.out_features)
        if config.r > most:
            raise ValueError(
                f"lora: rank {config.r} is larger than {name} ({linear.out_features} x {linear.in_features}); "
                f"expected at most {most}. Lower r, or leave that module out of target_modules."
            )
