"""transformers' auto classes, whose models are applied when they are returned.

    from automodel_accel import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("...")                             # applied with the default settings
    model = AutoModelForCausalLM.from_pretrained("...", accel={"loss": False})      # an AccelConfig or a dict of its fields
    model = AutoModelForCausalLM.from_pretrained("...", accel=False)                # transformers' own

    model = AutoModelForCausalLM.from_pretrained(folder, mesh=Mesh(shard=8))        # spread; each rank reads its part

Everything but `accel` and `mesh` is transformers': names, arguments, errors, remote code, adapter folders. A class shares the table of
models with the one that it derives from, so what is registered with either is known to both; nothing is registered here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from automodel_accel.api import apply
from automodel_accel.config import AccelConfig

IN_SHARDS = frozenset(
    {"dtype", "attn_implementation", "trust_remote_code"}
)  # what is passed on where each rank reads its part

Accel = AccelConfig | dict[str, Any] | bool | None

_ACCEL = """
        automodel_accel adds one keyword, `accel` (`AccelConfig`, `dict`, `bool`, *optional*): settings for
        `automodel_accel.apply`, which the model is given before it is returned. None or True are the default settings; with
        False nothing is applied. A wrong value raises a ValueError.
"""
_MESH = """        `from_pretrained` adds `mesh` (`Mesh`, *optional*): the model is spread over it. With FSDP2 or tensor parallel it is built
        on meta, and each rank reads its part from a folder of safetensors; then `dtype`, `attn_implementation` and
        `trust_remote_code` are the only other keywords. What fits neither the mesh nor the folder raises a ValueError.
"""


def _documented_by(method: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def give(ours: Callable[..., Any]) -> Callable[..., Any]:
        ours.__doc__ = (method.__doc__ or "") + _ACCEL + (_MESH if ours.__name__ == "from_pretrained" else "")
        return ours

    return give


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    __doc__ = transformers.AutoModelForCausalLM.__doc__

    @classmethod
    @_documented_by(transformers.AutoModelForCausalLM.from_pretrained)
    def from_pretrained(cls, *args: Any, accel: Accel = None, mesh: Any = None, **kwargs: Any) -> Any:
        if mesh is not None:
            return _spread(super(), mesh, accel, *args, **kwargs)
        return _build(super().from_pretrained, args, kwargs, accel)

    @classmethod
    @_documented_by(transformers.AutoModelForCausalLM.from_config)
    def from_config(cls, *args: Any, accel: Accel = None, **kwargs: Any) -> Any:
        return _build(super().from_config, args, kwargs, accel)


class AutoModelForImageTextToText(transformers.AutoModelForImageTextToText):
    __doc__ = transformers.AutoModelForImageTextToText.__doc__

    @classmethod
    @_documented_by(transformers.AutoModelForImageTextToText.from_pretrained)
    def from_pretrained(cls, *args: Any, accel: Accel = None, mesh: Any = None, **kwargs: Any) -> Any:
        if mesh is not None:
            return _spread(super(), mesh, accel, *args, **kwargs)
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


def _spread(auto: Any, mesh: Any, accel: Accel, folder: str | Path, **kwargs: Any) -> Any:
    """Built and read by transformers where each rank keeps all of the model, else on meta and in parts."""
    from automodel_accel.parallel import load_sharded
    from automodel_accel.parallel.order import ranks_of

    settings, ranks = _settings(accel), ranks_of(mesh)
    if settings is None:
        raise ValueError("accel=False leaves the model alone, and mesh= spreads it; expected one of the two.")
    if ranks.device_mesh is None or (ranks.mesh.wrapping != "fsdp2" and ranks.mesh.tensor == 1):
        return apply(auto.from_pretrained(folder, **kwargs), settings, mesh=ranks)
    if unknown := kwargs.keys() - IN_SHARDS:
        raise ValueError(
            f"{sorted(unknown)[0]}: with mesh= each rank reads its part, which knows {sorted(IN_SHARDS)} only."
        )
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder}: with mesh= each rank reads its part of a folder; make one: hf download {folder} --local-dir ..."
        )
    remote = {"trust_remote_code": kwargs["trust_remote_code"]} if "trust_remote_code" in kwargs else {}
    config = transformers.AutoConfig.from_pretrained(folder, **remote)
    with torch.device("meta"):
        model = auto.from_config(config, **{"dtype": config.dtype, **kwargs}).eval()
    if (Path(folder) / transformers.utils.GENERATION_CONFIG_NAME).exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    spread = apply(model, settings, mesh=ranks)
    load_sharded(spread, folder)
    return spread


def _settings(accel: object) -> AccelConfig | None:
    """The settings to apply, or None to leave the model alone."""
    if accel is False:
        return None
    if accel is None or accel is True:
        return AccelConfig()
    if not isinstance(accel, AccelConfig | dict):
        raise ValueError(f"accel={accel!r}: expected an AccelConfig, a dict of its fields, True, False or None.")
    return AccelConfig.build(accel)
