"""Builds a tiny model of any type, with weights that betray a wrong swap."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from automodel_accel.patches.probe import PROBE_ERRORS
from automodel_accel.recipes.tiny import fields as names
from automodel_accel.recipes.tiny.configuration import default_config
from automodel_accel.recipes.tiny.exceptions import EXCEPTIONS
from automodel_accel.recipes.tiny.shrink import Rules, Sizes, shrink

MAPPINGS: Mapping[str, Mapping[str, Any]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "vlm": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
# what code may raise that is given a configuration or an input that it was not written for
BUILD_ERRORS = (*PROBE_ERRORS, StrictDataclassError, MemoryError)
MOST_PARAMETERS = 80e6
_NOTHING = 1e-6  # some vision towers start at 1e-10: no pixel would reach the loss
_WIDE = Sizes(hidden=256, heads=2, kv_heads=2, head_dim=128)
_MIDDLE = Sizes(hidden=256, heads=4, kv_heads=2, head_dim=64)
# tried in this order: the first suits nine types of ten
ATTEMPTS = (
    Rules(),
    Rules(fill=True),
    Rules(every_kind=True),
    Rules(fill=True, every_kind=True),
    Rules(rope_by_kind=True),
    Rules(_MIDDLE),
    Rules(_MIDDLE, fill=True),
    Rules(_WIDE),
    Rules(_WIDE, fill=True),
    Rules(_MIDDLE, fill=True, every_kind=True, rope_by_kind=True),
    Rules(Sizes(layers=4)),
    Rules(Sizes(layers=6), fill=True),
)
_MISSING = re.compile(r"object has no attribute '(\w+)'")
_FIRST_REPAIRED_TOKEN = 40


@dataclass(frozen=True, slots=True)
class Type:
    """What a tiny model is made of.

    Attributes:
        name: Model type of transformers.
        kind: Which of `MAPPINGS` has its class: "causal" or "vlm".
        source: The configuration to shrink; None for the default one of the type.
    """

    name: str
    kind: str
    source: PreTrainedConfig | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class that the mapping names."""
        cls = MAPPINGS[self.kind][self.name]
        return getattr(transformers, cls if isinstance(cls, str) else cls[0])  # type: ignore[no-any-return]

    def whole(self, rules: Rules) -> PreTrainedConfig:
        """The tiny configuration that names the type, of which the class may take a part."""
        return shrink(default_config(CONFIG_MAPPING[self.name]) if self.source is None else self.source, rules)

    def config(self, rules: Rules) -> PreTrainedConfig:
        """The configuration that the class of the mapping takes, tiny."""
        wanted = getattr(self.model_class, "config_class", None)
        config = self.whole(rules)
        if wanted is not None and not isinstance(config, wanted):
            # a language model named by its vision-language configuration
            parts = [getattr(config, part, None) for part in getattr(type(config), "sub_configs", {})]
            config = next((part for part in parts if isinstance(part, wanted)), config)
        if self.kind == "causal" and hasattr(config, "is_decoder") and not config.is_encoder_decoder:
            config.is_decoder = True
        decoder = getattr(config, "decoder", None)
        if isinstance(decoder, PreTrainedConfig) and hasattr(decoder, "add_cross_attention"):
            decoder.is_decoder = decoder.add_cross_attention = True
        if self.name in EXCEPTIONS:
            EXCEPTIONS[self.name](config)
        return config


def make_model(type: Type, rules: Rules, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model in training mode; the same for the same seed. Raises one of `BUILD_ERRORS`."""
    cls, config = type.model_class, type.config(rules)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(config).parameters())
    if count > MOST_PARAMETERS:
        raise MemoryError(f"{count / 1e6:.0f} million parameters after shrinking")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(type.config(rules))
    shake(model, seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    cast: dict[torch.dtype, Any] = {
        torch.float32: model.float,
        torch.bfloat16: model.bfloat16,
        torch.float16: model.half,
        torch.float64: model.double,
    }
    return cast[dtype]().train()  # type: ignore[no-any-return]  # not `to`, which makes complex buffers real


@torch.no_grad()
def shake(model: nn.Module, seed: int) -> None:
    """Noise on every vector, so that a norm's w is not 1 and a bias not 0; numbers for what is not finite, or next to nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if not torch.isfinite(parameter).all():
            parameter.copy_(noise * 0.02)
        if parameter.dim() <= 1:
            parameter.add_(noise * 0.1)
        elif parameter.abs().max() < _NOTHING:
            parameter.copy_(noise * 0.05)


def repaired(rules: Rules, error: BaseException) -> Rules | None:
    """The rules with the attribute that the error misses, where its name says what it is."""
    found = _MISSING.search(str(error))
    if found is None or found[1] in rules.repairs:
        return None
    values = (
        (names.TOKEN, _FIRST_REPAIRED_TOKEN + len(rules.repairs)),
        (re.compile("rope_theta$"), 10000.0),
        (re.compile("num_hidden_layers$"), 2),
    )
    for pattern, value in values:
        if pattern.match(found[1]):
            return replace(rules, repairs={**rules.repairs, found[1]: value})
    return None
