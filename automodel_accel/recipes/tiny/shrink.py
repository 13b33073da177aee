"""Makes the configuration of any model tiny, from its fields alone: no table of models.

Three ideas: a field's name says what it is (`fields`); lists with an entry for each layer are thinned out so that every kind of layer
stays; and sums and products that hold among the fields of the default configuration hold among the tiny ones.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig, TimmWrapperConfig
from transformers.utils.import_utils import is_timm_available

from automodel_accel.patches.probe import PROBE_ERRORS
from automodel_accel.recipes.tiny import fields as names
from automodel_accel.recipes.tiny.configuration import (
    declared_default,
    has_lists,
    is_size,
    kinds_in_code,
    read,
    rope_of,
    try_to_set,
    undeclared,
)

_SMALL = 16
_MERGES = ("spatial_merge_size", "merge_size", "patch_merge_size")
_BASE_FIELDS = frozenset(f.name for f in fields(PreTrainedConfig))


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a tiny model is. Grouped queries, and heads * head_dim need not be the hidden size."""

    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    inner: int = 128
    layers: int = 2
    vocabulary: int = 256
    experts: int = 4
    chosen_experts: int = 2
    rank: int = 32
    image: int = 32
    patch: int = 4
    positions: int = 512
    window: int = 8
    state: int = 16
    chunk: int = 8


@dataclass(frozen=True, slots=True)
class Rules:
    """How a configuration is shrunk.

    Attributes:
        sizes: The sizes.
        fill: Give sizes to the fields that are None by default, for models that do not work without.
        every_kind: Layers of each kind that the model's code names, rather than of the default configuration's kinds.
        rope_by_kind: Rotary parameters for each kind of layer.
        repairs: Attributes that the model's code reads though its configuration class has none: name -> value.
    """

    sizes: Sizes = field(default_factory=Sizes)
    fill: bool = False
    every_kind: bool = False
    rope_by_kind: bool = False
    repairs: Mapping[str, Any] = field(default_factory=dict)


class Tokens:
    """Small numbers for special tokens, the same for the same token everywhere in a configuration."""

    FIRST = 10
    OF_IMAGES = -1  # stands for an image token whose number only checkpoints know

    def __init__(self) -> None:
        self._small: dict[int, int] = {}

    def __call__(self, token: Any) -> Any:
        """The small number of a token, or of each in a list."""
        if isinstance(token, (list, tuple)):
            return type(token)(self(each) for each in token)
        if not is_size(token) or (token < self.FIRST and token != self.OF_IMAGES):
            return token
        return self._small.setdefault(token, self.FIRST + len(self._small))


def shrink(config: PreTrainedConfig, rules: Rules, tokens: Tokens | None = None) -> PreTrainedConfig:
    """A tiny configuration of the same class; those inside it are shrunk too."""
    return _Shrink(config, rules, tokens or Tokens()).config()


class _Shrink:
    """The shrinking of one configuration: `old` holds its values, `new` those that change."""

    def __init__(self, config: PreTrainedConfig, rules: Rules, tokens: Tokens) -> None:
        self.source, self.rules, self.sizes, self.tokens = config, rules, rules.sizes, tokens
        self.declared = {f.name: declared_default(f) for f in fields(config)} if is_dataclass(config) else {}
        self.old = {name: read(config, name) for name in self.declared}
        self.new: dict[str, Any] = {}
        self.depth = next((v for n in names.LAYER_COUNTS if is_size(v := read(config, n))), None)
        self.layers = self.sizes.layers
        self.width = next((v for n in names.WIDTHS if is_size(v := self.old.get(n))), None)

    def config(self) -> PreTrainedConfig:
        chosen = self._choose_layers()
        defaults = self._defaults()
        for name, value in self.old.items():
            if names.TOKEN.match(name):
                self._token(name, value)
            elif name in _BASE_FIELDS:
                continue
            elif name in chosen:
                self.new[name] = self._layer_list(name, value, chosen[name])
            elif value is None:
                self._missing(name)
            elif is_size(value):
                self._number(name, value, defaults.get(name))
            else:
                self._other(name, value)
        self._hidden_fields()
        self._kinds_of_layers()
        self._counts()
        self._rope(defaults)
        self._relations()
        self._layer_indices()
        self._widths()
        self._keep(defaults)
        return self._made()

    def _choose_layers(self) -> dict[str, list[int]]:
        """List with an entry for each layer -> the layers to keep. Sets how many layers there will be."""
        lists = {
            name: value
            for name, value in self.old.items()
            if isinstance(value, (list, tuple))
            and self.depth
            and len(value) == self.depth > 2
            and name not in _BASE_FIELDS
        }
        patterns = [
            value
            for name, value in self.declared.items()
            if isinstance(value, (list, tuple))
            and 1 < len(value) != self.depth
            and all(isinstance(each, str) for each in value)
            and re.search("block|layer|pattern|type", name)
        ]
        self.layers = max([self.layers, *(min(6, len(pattern)) for pattern in patterns)])
        if not lists:
            return {}
        kinds = list(zip(*([repr(each) for each in value] for value in lists.values())))
        first = [index for index, kind in enumerate(kinds) if kind not in kinds[:index]][:6]
        rest = [index for index in reversed(range(len(kinds))) if index not in first]
        keep = sorted(first + rest[: max(0, self.layers - len(first))])
        self.layers = max(self.layers, len(keep))
        return dict.fromkeys(lists, keep)

    def _token(self, name: str, value: Any) -> None:
        if value is not None:
            self.new[name] = self.tokens(value)
        elif re.match("(image|video)_token_(id|index)$", name):  # a checkpoint has one
            self.new[name] = self.tokens(Tokens.OF_IMAGES)

    def _missing(self, name: str) -> None:
        if self._has_eyes(name):
            self.new[name] = shrink(self.source.sub_configs[name](), self.rules, self.tokens)
        elif self.declared[name] is None and self.rules.fill:
            self._fill(name)

    def _other(self, name: str, value: Any) -> None:
        if isinstance(value, TimmWrapperConfig) and not is_timm_available():
            # a tower of another package: another one in its place, so that at least the language model is tested
            self.new[name] = shrink(CLIPVisionConfig(), self.rules, self.tokens)
        elif isinstance(value, PreTrainedConfig):
            self.new[name] = shrink(value, self.rules, self.tokens)
        elif isinstance(value, float) and names.RANDOM.search(name):
            self.new[name] = 0.0
        elif isinstance(value, (list, tuple)):
            self._short_list(name, value)
        elif isinstance(value, dict) and "patch_to_query" in name:
            self.new[name] = {(self.sizes.image // self.sizes.patch) ** 2: 4}

    def _has_eyes(self, name: str) -> bool:
        """Whether a missing part of the configuration is that of the vision tower."""
        part = type(self.source).sub_configs.get(name)
        return name == "vision_config" and isinstance(part, type) and issubclass(part, PreTrainedConfig)

    def _defaults(self) -> dict[str, Any]:
        try:
            default = type(self.source)()
        except PROBE_ERRORS:
            return self.old
        return {name: read(default, name) for name in self.declared}

    def _layer_list(self, name: str, value: Sequence[Any], keep: list[int]) -> Any:
        kept = [value[index] for index in keep]
        if names.KV_HEADS.match(name):
            kept = [self.sizes.kv_heads] * len(kept)
        elif names.HEADS.match(name):
            kept = [self.sizes.heads] * len(kept)
        elif names.INNER.match(name):
            kept = [self.sizes.inner if each else each for each in kept]
        elif "hidden_sizes" in name:
            kept = [self.sizes.hidden // 2 * (index + 1) for index in range(len(kept))]
        return type(value)(kept)  # type: ignore[call-arg]

    def _short_list(self, name: str, value: Any) -> None:
        if name == "image_grid_pinpoints" and value:
            self.new[name] = [[self.sizes.image, 2 * self.sizes.image]]
        if not value or not all(is_size(each) for each in value) or len(value) >= 12:
            return
        kind, count = type(value), len(value)
        if names.IMAGE.match(name):
            self.new[name] = kind(min(each, self.sizes.image) for each in value)
        elif "feature_layer" in name:
            self.new[name] = kind(max(-self.sizes.layers, min(each, self.sizes.layers - 1)) for each in value)
        elif names.HIDDEN.match(name) or "hidden_sizes" in name:
            self.new[name] = kind(self.sizes.hidden // 2 * (index + 1) for index in range(count))
        elif "channels" in name:
            self.new[name] = kind(min(each, 32) for each in value)
        elif names.HEADS.match(name) or name == "num_groups":
            self.new[name] = kind([2] * count)
        elif name == "depths":
            self.new[name] = kind([1] * count)

    def _number(self, name: str, value: int, default: Any) -> None:
        if self.declared[name] is None:
            if default != value:
                self.new[name] = value  # given by the configuration around this one
            elif not (value <= 256 and re.search("hidden|size", name)):
                return  # derived from other fields: let it be derived again
        size = self._size(name, value)
        if size is not None:
            self.new[name] = size

    def _size(self, name: str, value: int) -> int | None:  # noqa: C901
        """The tiny value of a number, or None where it stays."""
        sizes = self.sizes
        if "feature_layer" in name:
            return max(-sizes.layers, min(value, sizes.layers - 1))
        if value <= 0 or (names.RANDOM.search(name) and "sample" not in name):
            return None
        if names.LAYERS.match(name):
            return self.layers if value == self.depth else min(value, sizes.layers)
        if names.VOCABULARY.match(name):
            return value if value <= _SMALL else sizes.vocabulary
        if names.KV_HEADS.match(name):
            return self._kv_heads(value)
        if names.HEAD_DIM.match(name):
            return sizes.head_dim
        if names.EXPERTS.match(name) and "shared" in name:
            return 1
        at_most: tuple[tuple[re.Pattern[str], int], ...] = (
            (names.CHOSEN_EXPERTS, sizes.chosen_experts),
            (names.EXPERTS, sizes.experts),
            (names.HEADS, sizes.heads),
            (names.RANK, sizes.rank),
        )
        for pattern, size in at_most:
            if pattern.match(name):
                return min(value, size)
        if names.INNER.match(name):
            return sizes.inner
        if names.HIDDEN.match(name):
            return sizes.hidden
        at_most = (
            *((names.POSITIONS, sizes.positions), (names.WINDOW, sizes.window), (names.STATE, sizes.state)),
            *((names.CHUNK, sizes.chunk), (names.IMAGE, sizes.image), (names.PATCH, sizes.patch)),
            *((names.PERIOD, 2), (names.OFFSET, 1), (names.IMAGE_FEATURES, 16), (names.CODES, 16)),
            (names.CHANNELS, 32),
        )
        for pattern, size in at_most:
            if pattern.match(name):
                return min(value, size)
        return sizes.hidden if value > 4096 or (value == self.width and value >= 64) else None

    def _kv_heads(self, value: int) -> int:
        heads = next(
            (v for n, v in self.old.items() if names.HEADS.match(n) and not names.KV_HEADS.match(n) and is_size(v)), 0
        )
        tiny = min(heads, self.sizes.heads) or self.sizes.heads
        if value in (1, heads):
            return 1 if value == 1 else tiny
        return min(self.sizes.kv_heads, tiny)

    def _fill(self, name: str) -> None:
        sizes = self.sizes
        by_name = (
            (re.compile("topk_group|n_group|num_expert_group"), 1),
            (re.compile("indexer_kv_heads"), 1),
            (names.KV_HEADS, sizes.kv_heads),
            (names.CHOSEN_EXPERTS, sizes.chosen_experts),
            (names.EXPERTS, 1 if "shared" in name else sizes.experts),
            (names.WINDOW, sizes.window),
            (names.HEAD_DIM, sizes.head_dim),
            (names.HEADS, sizes.heads),
            (re.compile(".*layer_(indices|idx|ids)$"), [1]),
            (names.INNER, sizes.inner),
            (re.compile("clip_qkv"), 8),
            (re.compile(".*_(budget|ratio)$"), 4),
        )
        for pattern, size in by_name:
            if pattern.match(name):
                self.new[name] = size
                return
        if name == "mlp_layer_types" and self.depth:
            self.new[name] = (["dense", "sparse"] * self.layers)[: self.layers]
        elif name == "layer_types" and self.depth:
            self._name_layers()
        elif name == "default_language" and isinstance(self.old.get("languages"), (list, tuple)):
            self.new[name] = self.old["languages"][0]

    def _hidden_fields(self) -> None:
        """Numbers that the class takes but does not declare."""
        for name, value in undeclared(type(self.source)).items():
            if name not in self.old and name not in self.new and (size := self._size(name, value)) is not None:
                self.new[name] = size

    def _kinds_of_layers(self) -> None:
        if self.rules.every_kind and "layer_types" in self.old and self.depth:
            self._name_layers()
        for name, value in self.old.items():  # [[["global", "local"], 12]]: the kinds, how often
            match value:
                case [[[*kinds], int()]]:
                    self.new[name], self.layers = [[kinds, 1]], len(kinds)

    def _name_layers(self) -> None:
        kinds = kinds_in_code(self.source) or ["full_attention"]
        count = max(self.layers, min(len(kinds), 4))
        self.new["layer_types"], self.layers = (kinds * count)[:count], count

    def _counts(self) -> None:
        for name in names.LAYER_COUNTS:
            if name in self.new and is_size(self.declared.get(name)):
                self.new[name] = min(self.layers, self.declared[name])
        for name in ("n_group", "num_expert_group", "num_expert_groups"):
            if is_size(self.old.get(name)):
                self.new[name] = min(self.old[name], 2)
        if is_size(self.old.get("topk_group")):
            self.new["topk_group"] = 1

    def _rope(self, defaults: Mapping[str, Any]) -> None:
        heads = next((v for n, v in self.new.items() if names.HEADS.match(n) and is_size(v)), self.sizes.heads)
        width = next((self.new[n] for n in names.WIDTHS if n in self.new), self.sizes.hidden)
        head_dim = self.new.get("head_dim") or self.new.get("qk_rope_head_dim") or width // heads
        for name in ("rope_parameters", "rope_scaling"):
            value = self.old.get(name)
            if not isinstance(value, dict):
                continue
            if self.declared.get(name) is not None or has_lists(value) or value != defaults.get(name):
                self.new[name] = rope_of(value, head_dim)
        if self.rules.rope_by_kind and "rope_parameters" in self.old and "layer_types" in self.old:
            kinds = self.new.get("layer_types") or self.old["layer_types"] or []
            self.new["rope_parameters"] = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in kinds}

    def _relations(self) -> None:
        """Restore the sums and products of the default configuration."""
        self._state_space()
        width = self._first(*names.WIDTHS)
        if isinstance(self.old.get("pixel_shuffle_ratio"), float) and width and self._first("intermediate_size"):
            self.new["intermediate_size"] = int(self._now(width) / self.old["pixel_shuffle_ratio"] ** 2)
        dims = [name for name, value in self.old.items() if names.HEAD_DIM.match(name) and is_size(value)]
        for total in dims:
            for a, b in itertools.combinations([name for name in dims if name != total], 2):
                if "qk" in total and total in self.new and self.old[total] == self.old[a] + self.old[b]:
                    self.new[total] = self._now(a) + self._now(b)

    def _state_space(self) -> None:
        first = self._first
        width, expand = first(*names.WIDTHS), first("mamba_expand", "expand")
        heads = first("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads")
        head_dim = first("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim")
        if width and expand and heads and head_dim:
            product = self.old[expand] * self.old[width]
            if heads != "num_heads" or product == self.old[heads] * self.old[head_dim]:
                if first("mamba_d_ssm"):
                    self.new["mamba_d_ssm"] = self._now(heads) * self._now(head_dim)
                else:
                    self.new[heads] = max(1, self._now(expand) * self._now(width) // self._now(head_dim))
        for name in ("mamba_n_groups", "n_groups", "mamba_ngroups"):
            if heads and first(name):
                self.new[name] = min(self.old[name], 2)

    def _first(self, *candidates: str) -> str | None:
        return next((name for name in candidates if is_size(self.old.get(name)) and self.old[name]), None)

    def _now(self, name: str) -> Any:
        return self.new.get(name, self.old.get(name))

    def _layer_indices(self) -> None:
        for name, value in self.old.items():
            if name in self.new or name in _BASE_FIELDS or not isinstance(value, (list, tuple)) or not value:
                continue
            numbers = re.search("index|idx|layer|indices", name) and all(is_size(each) and each >= 0 for each in value)
            if numbers and max(value) >= self.layers:
                self.new[name] = type(value)(sorted({min(each, self.layers - 1) for each in value}))

    def _widths(self) -> None:
        """What several layers' or patches' features side by side are wide."""
        layers = self._now("intermediate_layers_indices")
        if isinstance(layers, (list, tuple)) and "vision_output_dim" in self.new and self.width:
            self.new["vision_output_dim"] = self._now("hidden_size") * (1 + len(layers))
        multiplier = self.old.get("channel_multiplier")
        if multiplier and is_size(base := self.old.get("base_channels")) and self.width == base * multiplier[-1]:
            self.new["hidden_size"] = self._now("base_channels") * multiplier[-1]
        seen_side_by_side = {}
        for name, part in [
            ("", self.source),
            *((name, part) for name, part in self.old.items() if isinstance(part, PreTrainedConfig)),
        ]:
            factor = next((each for merge in _MERGES if is_size(each := read(part, merge))), 1)
            width = read(part, "hidden_size")
            if factor > 1 and is_size(width):
                now = self._now("hidden_size") if part is self.source else read(self.new[name], "hidden_size")
                seen_side_by_side[width * factor**2] = now * factor**2
        for name, value in self.old.items():
            if name in self.new and is_size(value) and value in seen_side_by_side:
                self.new[name] = seen_side_by_side[value]

    def _keep(self, defaults: Mapping[str, Any]) -> None:
        """What a checkpoint sets otherwise than its class and is no size: tied embeddings, soft caps, biases, kinds of activations."""
        for name, value in self.old.items():
            if name in self.new or name in _BASE_FIELDS or not isinstance(value, (bool, int, float, str)):
                continue
            if value != defaults.get(name):
                self.new[name] = value

    def _made(self) -> PreTrainedConfig:
        made = type(self.source)(**self.new)
        for name, value in vars(
            self.source
        ).items():  # what the configuration around this one gave it beyond its fields
            if not name.startswith("_") and name not in vars(made) and name not in self.declared:
                try_to_set(made, name, value)
        for name, value in self.rules.repairs.items():
            if not hasattr(made, name):
                try_to_set(made, name, value)
        return made
