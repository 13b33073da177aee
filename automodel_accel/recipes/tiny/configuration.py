"""Reads configurations: what they declare, and what only their code tells."""

import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeGuard

from transformers import PreTrainedConfig
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

from automodel_accel.patches.probe import PROBE_ERRORS


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def default_config(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default configuration; where its own checks refuse the defaults, with one number set to zero."""
    try:
        return cls()
    except PROBE_ERRORS:
        for each in fields(cls):
            if is_size(each.default):
                try:
                    return cls(**{each.name: 0})  # type: ignore[arg-type]  # any field that is a number
                except PROBE_ERRORS:
                    continue
        raise


def declared_default(declared: Field[Any]) -> Any:
    """What a class declares a field to be; None where it declares nothing."""
    if declared.default is not MISSING:
        return declared.default
    return None if declared.default_factory is MISSING else declared.default_factory()


def read(config: PreTrainedConfig, name: str) -> Any:
    """An attribute as it is stored: with layers of different sizes, reading one through the class may be refused."""
    plain = getattr(config, "_getattr_without_heterogeneous_validation", None)
    try:
        return plain(name, None) if plain else getattr(config, name, None)
    except PROBE_ERRORS:
        return vars(config).get(name)


def try_to_set(config: PreTrainedConfig, name: str, value: Any) -> None:
    """Set an attribute, unless the class will not have it."""
    try:
        setattr(config, name, value)
    except PROBE_ERRORS:
        return  # a property of the class, which knows better


def has_lists(value: Mapping[str, Any]) -> bool:
    """Whether any of the values is a list or a mapping."""
    return any(isinstance(each, (list, tuple, dict)) for each in value.values())


def rope_of(value: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary parameters for a tiny head: sections and factors cut to its size."""
    half = int(head_dim * value.get("partial_rotary_factor", 1.0)) // 2
    tiny: dict[str, Any] = {}
    for name, each in value.items():
        if isinstance(each, dict):
            tiny[name] = rope_of(each, head_dim)
        elif isinstance(each, (list, tuple)) and each and all(is_size(part) for part in each):
            parts = [max(1, round(part * half / sum(each))) for part in each]
            tiny[name] = type(each)([*parts[:-1], parts[-1] + half - sum(parts)])
        elif isinstance(each, (list, tuple)):
            tiny[name] = list(each)[: head_dim // 2]
        else:
            tiny[name] = each
    return tiny


def _text_of(module: str) -> str:
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file).read_text(encoding="utf-8") if file else ""


def undeclared(cls: type) -> dict[str, int]:
    """Numbers that the class takes from its keyword arguments by hand: name -> default."""
    code = getattr(getattr(cls, "__post_init__", None), "__code__", None)
    found = re.findall(r"kwargs\.(?:pop|get)\(\s*[\"'](\w+)[\"'],\s*([\d_]+)\s*\)", _text_of(cls.__module__))
    return {name: int(value) for name, value in found if code and name in code.co_consts}


def kinds_in_code(config: PreTrainedConfig) -> list[str]:
    """The kinds of layers that the model's code tells apart."""
    text = _text_of(type(config).__module__.replace("configuration_", "modeling_"))
    return [kind for kind in ALLOWED_LAYER_TYPES if f'"{kind}"' in text]
