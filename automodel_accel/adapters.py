"""LoRA by one argument of `apply`: PEFT's own adapters, whose configuration is checked, and which leave no trace where they fail."""

import copy
import fnmatch
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from torch import nn

from automodel_accel.kernels.contract import unknown_name

WILDCARDS = frozenset("*?[")
ALL_LINEAR = "all-linear"  # in PEFT, whatever its case


def with_lora(model: nn.Module, config: "peft.LoraConfig | dict[str, Any]") -> peft.PeftModel:
    """`peft.get_peft_model`, for which target_modules may hold wildcards.

    Args:
        model: Without adapters. It is changed in place, as by PEFT; `unload()` of what is returned undoes it.
        config: PEFT's, or a dict of its fields; it is copied. A target such as "*_proj" stands for all linears whose last name
            matches; one with dots is matched against whole names. Excluded modules may hold wildcards too: "*vision*" leaves out
            all that lies in a module of such a name.

    Raises:
        ValueError: the model has adapters, a name matches nothing (with the nearest names), the rank is larger than a layer, or
            PEFT refuses the configuration. The model is left as it was.
    """
    chosen = _config(config)
    if isinstance(model, peft.PeftModel) or hasattr(model, "peft_config"):
        raise ValueError(
            f"this {type(model).__name__} has adapters already; leave lora out, or add another one by model.add_adapter."
        )
    _resolve(chosen, model)
    with left_as_it_was(model):
        adapted = peft.get_peft_model(model, chosen)
        _check_ranks(model)
    return adapted


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Where the block raises, take out what was put into the model, and let train what trained before."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    names = set(vars(model))

    def restore() -> None:
        for module, its_children in children:
            module._modules.clear()
            module._modules.update(its_children)
        for parameter, before in trained:
            parameter.requires_grad_(before)
        for name in set(vars(model)) - names:
            delattr(model, name)

    with ExitStack() as undo:
        undo.callback(restore)
        yield
        undo.pop_all()


def _config(config: "peft.LoraConfig | dict[str, Any]") -> peft.LoraConfig:
    if isinstance(config, dict):
        known = [field.name for field in fields(peft.LoraConfig)]
        for name in config:
            if name not in known:
                raise ValueError(f"lora: {unknown_name('setting', name, known)}")
        return peft.LoraConfig(**config)
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(
            f"lora is a {type(config).__name__}; expected a peft.LoraConfig or a dict of its fields. Adapters that were saved are "
            "loaded by peft.PeftModel.from_pretrained(model, folder), and then applied."
        )
    return copy.copy(config)


def _resolve(config: peft.LoraConfig, model: nn.Module) -> None:
    """Replace wildcards by names; refuse names that match nothing, of which PEFT takes some in silence."""
    modules = dict(model.named_modules())
    every = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    gates = [name for name, module in every.items() if min(module.in_features, module.out_features) == 1]
    linears = [name for name in every if name not in gates]  # of one number there is no lower rank: not by a pattern
    targets = config.target_modules
    if isinstance(targets, str) and targets[:1] == "*":
        targets = [targets]  # no regular expression begins so
    if isinstance(targets, list | set | tuple):
        config.target_modules = sorted(_expanded(targets, list(modules), linears))
    elif isinstance(targets, str) and targets.lower() != ALL_LINEAR and not _matches(targets, modules):
        raise ValueError(
            f"lora: target_modules {targets!r} is a regular expression of whole names, and matches none, such as "
            f"{linears[0] if linears else 'none'}; the last names of linears are {', '.join(_last(linears))}. Give last names as a list."
        )
    excluded = config.exclude_modules
    if gates and isinstance(targets, str) and targets.lower() == ALL_LINEAR and not isinstance(excluded, str):
        excluded = [*(excluded or ()), *gates]
    if isinstance(excluded, str) and excluded[:1] == "*":
        excluded = [excluded]
    if isinstance(excluded, list | set | tuple):
        config.exclude_modules = sorted(_excluded(excluded, list(modules)))
    _check_names(config, model, modules)


def _check_names(config: peft.LoraConfig, model: nn.Module, modules: Iterable[str]) -> None:
    """Parameters that are adapted and modules that are saved are there."""
    parameters = [name for name, _ in model.named_parameters()]
    for name in config.target_parameters or ():
        if not any(_ends_in(known, name) for known in parameters):
            raise ValueError(f"lora: {unknown_name('target parameter', name, _last(parameters, name.count('.') + 1))}")
    for name in config.modules_to_save or ():
        if not any(known.endswith(name) for known in modules):  # as in PEFT: "head" is lm_head too
            named = [last for last in _last(modules) if not last.isdigit()]
            raise ValueError(f"lora: {unknown_name('module to save', name, named)}")


def _matches(pattern: str, names: Iterable[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise ValueError(f"lora: target_modules {pattern!r} is no regular expression: {error}.") from error


def _expanded(targets: Iterable[str], modules: list[str], linears: list[str]) -> set[str]:
    found: set[str] = set()
    for target in targets:
        if WILDCARDS.isdisjoint(target):
            matches = {target} if any(_ends_in(name, target) for name in modules) else set()
        elif "." in target:
            matches = {name for name in linears if fnmatch.fnmatchcase(name, target)}
        else:
            matches = _with_last_name(target, modules, linears)
        if not matches:
            raise ValueError(f"lora: {unknown_name('target module', target, _last(linears))}")
        found |= matches
    return found


def _with_last_name(pattern: str, modules: list[str], linears: list[str]) -> set[str]:
    """Last names of linears; the whole names of those that share theirs with a module that is none, which PEFT would refuse."""
    lasts = {last for last in _last(linears) if fnmatch.fnmatchcase(last, pattern)}
    shared = lasts & set(_last(set(modules) - set(linears)))
    return (lasts - shared) | {name for name in linears if name.rpartition(".")[2] in shared}


def _excluded(patterns: Iterable[str], modules: list[str]) -> set[str]:
    """Names as they are; for one with wildcards all modules whose whole name matches, or that lie in one of such a name."""
    found: set[str] = set()
    for pattern in patterns:
        if WILDCARDS.isdisjoint(pattern):
            found.add(pattern)
            continue
        matches = re.compile(fnmatch.translate(pattern)).match
        found |= {name for name in modules if matches(name) or any(map(matches, name.split(".")))} - {""}
    return found


def _last(names: Iterable[str], count: int = 1) -> list[str]:
    """The last parts of dotted names, each once."""
    return sorted({".".join(name.split(".")[-count:]) for name in names if name})


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _check_ranks(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or isinstance(layer.get_base_layer(), nn.modules.conv._ConvNd):
            continue
        high, wide = layer.out_features, layer.in_features
        if high is None or wide is None:
            continue  # PEFT does not know this kind of layer
        rank, most = max(layer.r.values()), min(high, wide)
        if rank > most:
            raise ValueError(
                f"lora: rank {rank} is larger than {name} ({high} x {wide}); expected at most {most}. Lower r, give that module "
                "a rank of its own in rank_pattern, or leave it out of target_modules."
            )
