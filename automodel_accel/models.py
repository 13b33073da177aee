"""transformers' auto classes, whose models are applied when they are returned.

    from automodel_accel import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("...")                             # applied with the default settings
    model = AutoModelForCausalLM.from_pretrained("...", accel={"loss": False})      # an AccelConfig or a dict of its fields
    model = AutoModelForCausalLM.from_pretrained("...", accel=False)                # transformers' own

Everything but `accel` is transformers': names, arguments, errors, remote code, adapter folders. A class shares the table of
models with the one that it derives from, so what is registered with either is known to both; nothing is registered here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import nn

from automodel_accel.api import apply
from automodel_accel.config import AccelConfig

Accel = AccelConfig | dict[str, Any] | bool | None

_ACCEL = """
        automodel_accel adds one keyword, `accel` (`AccelConfig`, `dict`, `bool`, *optional*): settings for
        `automodel_accel.apply`, which the model is given before it is returned. None or True are the default settings; with
        False nothing is applied. A wrong value raises a ValueError.
"""


def _documented_by(method: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def give(ours: Callable[..., Any]) -> Callable[..., Any]:
        ours.__doc__ = (method.__doc__ or "") + _ACCEL
        return ours

    return give


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    __doc__ = transformers.AutoModelForCausalLM.__doc__

    @classmethod
    @_documented_by(transformers.AutoModelForCausalLM.from_pretrained)
    def from_pretrained(cls, *args: Any, accel: Accel = None, **kwargs: Any) -> Any:
        return _build(super().from_pretrained, args, kwargs, accel)

    @classmethod
    @_documented_by(transformers.AutoModelForCausalLM.from_config)
    def from_config(cls, *args: Any, accel: Accel = None, **kwargs: Any) -> Any:
        return _build(super().from_config, args, kwargs, accel)


class AutoModelForImageTextToText(transformers.AutoModelForImageTextToText):
    __doc__ = transformers.AutoModelForImageTextToText.__doc__

    @classmethod
    @_documented_by(transformers.AutoModelForImageTextToText.from_pretrained)
    def from_pretrained(cls, *args: Any, accel: Accel = None, **kwargs: Any) -> Any:
        return _build(super().from_pretrained, args, kwargs, accel)

    @classmethod
    @_documented_by(transformers.AutoModelForImageTextToText.from_config)
    def from_config(cls, *args: Any, accel: Accel = None, **kwargs: Any) -> Any:
        return _build(super().from_config, args, kwargs, accel)


def _build(build: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], accel: Accel) -> Any:
    settings = _settings(accel)  # first: loading may take minutes
    built = build(*args, **kwargs)
    if settings is not None:
        model: nn.Module = built[0] if isinstance(built, tuple) else built  # a tuple with output_loading_info=True
        apply(model, settings)
    return built


def _settings(accel: object) -> AccelConfig | None:
    """The settings to apply, or None to leave the model alone."""
    if accel is False:
        return None
    if accel is None or accel is True:
        return AccelConfig()
    if not isinstance(accel, AccelConfig | dict):
        raise ValueError(f"accel={accel!r}: expected an AccelConfig, a dict of its fields, True, False or None.")
    return AccelConfig.build(accel)
