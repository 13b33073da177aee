"""Freezing by part: the vision tower, the audio tower, the projector, the embeddings, the language model.

    freeze(model, "vision_tower", "embeddings")     # raises where the model has no such part
    print(summary(model))                           # trainable parameters of each part

A part is found by what the model declares and does, never by the model's name: transformers' `get_input_embeddings` and
`get_encoder`, the modalities that a submodule says it takes, and which submodules the code of `get_image_features` uses.
A part that is not told apart without doubt is refused. Parts are disjoint and make up the whole model.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from automodel_accel.kernels.contract import unknown_name
from automodel_accel.patches.rebind import named_in

VISION, AUDIO, PROJECTOR, EMBEDDINGS, LANGUAGE = PARTS = (
    "vision_tower",
    "audio_tower",
    "projector",
    "embeddings",
    "language_model",
)
OTHER = "other"
_FEATURES = ("get_image_features", "get_video_features", "get_audio_features")
_NOT_FOLLOWED = frozenset({"forward", "get_input_embeddings", "get_placeholder_mask"})
_PIXELS = re.compile("pixel|patches")


@dataclass(frozen=True, slots=True, kw_only=True)
class Freezing:
    """Which parts keep their values, as a recipe writes it; see `freeze`.

    Attributes:
        vision_tower: What makes features of images.
        audio_tower: What makes features of sound.
        projector: What brings those features to the width of the language model.
        embeddings: Those of tokens, and the output head where it is tied to them.
        language_model: What writes text, with its embeddings and its head.
    """

    vision_tower: bool = False
    audio_tower: bool = False
    projector: bool = False
    embeddings: bool = False
    language_model: bool = False

    def parts(self) -> tuple[str, ...]:
        """The names of the parts that are frozen."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name))


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the parts of a model lie.

    Attributes:
        names: Part -> the modules, each with all that no other part claims inside it, and single parameters.
        missing: Part -> why it is not among `names`.
    """

    names: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, str]

    def part_of(self, name: str) -> str:
        """The part that a parameter of that name belongs to; "other" where none claims it."""
        claims = ((part, place) for part, places in self.names.items() for place in places if _lies_in(name, place))
        return max(claims, key=lambda claim: len(claim[1]), default=(OTHER, ""))[0]


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters of one part."""

    trainable: int
    total: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Parameters of each part that the model has, in the order of `PARTS`, and of what belongs to none."""

    counts: Mapping[str, Count]

    def __str__(self) -> str:
        rows = [*self.counts.items(), ("all", Count(self.trainable, sum(one.total for one in self.counts.values())))]
        return "\n".join(f"{name:15}{one.trainable:>16,} of {one.total:>16,} trainable" for name, one in rows)

    @property
    def trainable(self) -> int:
        """Parameters that are trained, of all parts."""
        return sum(one.trainable for one in self.counts.values())


def freeze(model: nn.Module, *parts: str) -> Summary:
    """Stop training these parts. Call it before FSDP; with LoRA before or after, see `lora_exclusion`.

    Embeddings that are tied to the output head are frozen with it; language_model includes the embeddings and the head.

    Args:
        model: A transformers model, or PEFT's around one, whose adapters in these parts are frozen as well.
        parts: Of `PARTS`. None freezes nothing.

    Returns:
        What is trained now.

    Raises:
        ValueError: an unknown part, or one that this model does not have; names those that it has. Nothing is frozen then.
    """
    chosen = _chosen(parts, find_parts(model))
    for part, parameter in _by_part(model):
        if part in chosen:
            parameter.requires_grad_(False)
    return summary(model)


def summary(model: nn.Module) -> Summary:
    """Trainable and all parameters of each part; shared parameters count once."""
    counted: dict[str, list[torch.Tensor]] = {part: [] for part in (*PARTS, OTHER)}
    for part, parameter in _by_part(model):
        counted[part].append(parameter)
    return Summary(
        {
            part: Count(sum(one.numel() for one in its if one.requires_grad), sum(one.numel() for one in its))
            for part, its in counted.items()
            if its
        }
    )


def lora_exclusion(model: nn.Module, *parts: str) -> str:
    """A regular expression for `LoraConfig(exclude_modules=...)`, so that PEFT puts no adapter into these parts.

    Raises:
        ValueError: as `freeze`.
    """
    found = find_parts(model)
    chosen = _chosen(parts, found)
    names = [name for name, _ in _base(model).named_modules() if name and found.part_of(name) in chosen]
    return "|".join(re.escape(name) for name in names) or "(?!)"


def find_parts(model: nn.Module) -> Parts:
    """Where the parts of a model lie, and why those that are missing are."""
    model = _base(model)
    embeddings = _embeddings(model)
    if embeddings is None:
        return Parts({}, dict.fromkeys(PARTS, "it does not say where its input embeddings are"))
    whole = _whole(model, embeddings)
    names: dict[str, tuple[str, ...]] = {EMBEDDINGS: (embeddings,)}
    if whole is None:
        silent = dict.fromkeys((VISION, AUDIO, PROJECTOR), "the model takes text alone")
        return Parts({**names, LANGUAGE: ("",)}, silent)
    return _Composite(model, whole, embeddings).parts()


class _Composite:
    """The module that joins the features of images with those of text, and its children."""

    def __init__(self, model: nn.Module, whole: str, embeddings: str) -> None:
        self.module = model.get_submodule(whole)
        self.prefix = whole + "." if whole else ""
        self.embeddings = embeddings
        self.text = embeddings[len(self.prefix) :].split(".")[0]  # the child that holds the embeddings
        weight = model.get_submodule(embeddings).weight
        assert isinstance(weight, torch.Tensor)
        self.width = weight.shape[-1]
        self.children = {
            name: child
            for name, child in self.module.named_children()
            if name != self.text and next(child.parameters(), None) is not None
        }
        self.own = [name for name, _ in self.module.named_parameters(recurse=False)]
        self.has_text_model = any(isinstance(one, nn.ModuleList) for one in self._text_modules())
        self.used = self._used()

    def parts(self) -> Parts:
        missing: dict[str, str] = {}
        names: dict[str, tuple[str, ...]] = {EMBEDDINGS: (self.embeddings,)}
        towers = self._vision_towers()
        audio = [name for name in self._encoders("audio") if name not in towers]
        projector = self._projector(towers, audio)
        for part, found, why in (
            (VISION, towers, "no submodule of it declares that it takes images"),
            (AUDIO, audio, "no submodule of it declares that it takes sound"),
        ):
            if found:
                names[part] = self._full(found)
            else:
                missing[part] = why
        if isinstance(projector, str):
            missing[PROJECTOR] = projector
        else:
            names[PROJECTOR] = self._full(projector)
        if self.used is None and not self.has_text_model:
            missing[LANGUAGE] = "its layers are not told apart from what leads images to them"
        else:
            names[LANGUAGE] = ("",)  # all that no other part claims
        others = self._others(towers, audio)
        return Parts({**names, **({OTHER: self._full(others)} if others else {})}, missing)

    def _text_modules(self) -> Iterable[nn.Module]:
        return getattr(self.module, self.text).modules() if self.text else ()

    def _used(self) -> list[str] | None:
        """Children and parameters that the code of get_image_features and its like uses; None without such a method."""
        kind = type(self.module)
        methods = [getattr(kind, name) for name in _FEATURES if hasattr(kind, name)]
        if not methods:
            return None
        found = set(_reached(kind, methods))
        if self.has_text_model:  # some project only when they put the features among those of the text
            found |= named_in(kind.forward) - {name for name, child in self.children.items() if self._is_text(child)}
        return [name for name in (*self.children, *self.own) if name in found]

    def _vision_towers(self) -> list[str]:
        towers = self._encoders("image")
        among = list(self.children) if self.used is None else self.used
        models = [name for name in among if isinstance(self.children.get(name), PreTrainedModel)]
        towers += [name for name in models if name not in towers and _takes_pixels(self.children[name])]
        heard = self._encoders("audio")
        seeing = [name for name in models if name not in heard]
        return towers or (seeing if self.used and len(seeing) == 1 else [])

    def _encoders(self, modality: str) -> list[str]:
        """The child that transformers says encodes this modality."""
        find: Callable[..., object] | None = getattr(self.module, "get_encoder", None)
        encoder = find(modality=modality) if find else None
        return [name for name, child in self.children.items() if child is encoder]

    def _projector(self, towers: list[str], audio: list[str]) -> list[str] | str:
        """The names between towers and language model, or why they are not known."""
        if self.used is None and not self.has_text_model:
            return "it is not told apart from the layers of the language model"
        among = [*self.children, *self.own] if self.used is None else self.used
        between = [name for name in among if name not in towers and name not in audio]
        if not between and self.used is not None:
            between = [f"{name}.{inner}" for name in towers for inner in _last_in(self.children[name], self.width)]
        return (
            between
            or "no module is told apart between its towers and its language model; one inside a tower belongs to it"
        )

    def _others(self, towers: list[str], audio: list[str]) -> list[str]:
        """Children for which the path of images has no use, beside a language model that is a module of its own."""
        if self.used is None or not self.has_text_model:
            return []
        known = {*towers, *audio, *self.used}
        return [name for name, child in self.children.items() if name not in known and not self._is_text(child)]

    def _is_text(self, child: nn.Module) -> bool:
        """Whether a child speaks: the output head, or a decoder beside the encoder that holds the embeddings."""
        head = getattr(self.module, "get_output_embeddings", lambda: None)()
        decoder = getattr(self.module, "get_decoder", lambda: None)()
        return any(one is head or one is decoder for one in child.modules())

    def _full(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(self.prefix + name for name in names)


def _base(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's."""
    inner: Any = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def _embeddings(model: nn.Module) -> str | None:
    """The name of the input embeddings, by the model's own word, or else its decoder's."""
    for ask in ("get_input_embeddings", "get_decoder"):
        try:
            found: Any = getattr(model, ask)()
            found = found.get_input_embeddings() if ask == "get_decoder" else found
        except (AttributeError, NotImplementedError):
            continue
        for name, module in model.named_modules():
            if module is found and hasattr(module, "weight"):
                return str(name)
    return None


def _whole(model: nn.Module, embeddings: str) -> str | None:
    """The innermost module around the embeddings that is given images; None where there is none."""
    steps = embeddings.split(".")
    around = [".".join(steps[:count]) for count in range(len(steps))]
    return next((name for name in reversed(around) if _joins(model.get_submodule(name))), None)


def _joins(module: nn.Module) -> bool:
    if any(hasattr(module, name) for name in _FEATURES):
        return True
    return any(_PIXELS.search(name) for name in inspect.signature(module.forward).parameters)


def _takes_pixels(module: nn.Module) -> bool:
    return bool(_PIXELS.search(str(getattr(module, "main_input_name", ""))))


def _reached(kind: type, methods: Iterable[Callable[..., Any]]) -> Iterator[str]:
    """Names in the code of these methods, and of the methods of the class that they call."""
    seen: set[str] = set()
    waiting = list(methods)
    while waiting:
        for name in named_in(waiting.pop()) - seen:
            seen.add(name)
            yield name
            method = inspect.getattr_static(kind, name, None)
            if inspect.isfunction(method) and name not in _NOT_FOLLOWED:
                waiting.append(method)


def _last_in(tower: nn.Module, width: int) -> list[str]:
    """Children that a tower uses after its blocks and that end in the width of the text: its own projector."""
    code = inspect.unwrap(type(tower).forward).__code__
    order = {name: place for place, name in enumerate(code.co_names)}
    children = {name: child for name, child in tower.named_children() if name in order}
    lists = [name for name, child in children.items() if isinstance(child, nn.ModuleList)]
    if not lists:
        return []
    blocks = min(order[name] for name in lists)
    return [name for name, child in children.items() if order[name] > blocks and _ends_in(child, width)]


def _ends_in(module: nn.Module, width: int) -> bool:
    return any(isinstance(one, nn.Linear) and one.out_features == width for one in module.modules())


def _chosen(parts: Iterable[str], found: Parts) -> frozenset[str]:
    """The parts to freeze; the language model has the embeddings in it."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(unknown_name("part", part, PARTS))
        if part not in found.names:
            has = ", ".join(name for name in PARTS if name in found.names) or "none that can be told apart"
            raise ValueError(f"this model has no {part}: {found.missing[part]}. It has: {has}.")
    chosen = frozenset(parts)
    return chosen | {EMBEDDINGS} if LANGUAGE in chosen else chosen


def _by_part(model: nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every parameter once, with its part; one that is shared with the embeddings is theirs."""
    base = _base(model)
    found = find_parts(model)
    owners: dict[int, tuple[str, torch.nn.Parameter]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        part = found.part_of(name)
        if id(parameter) not in owners or part == EMBEDDINGS:
            owners[id(parameter)] = part, parameter
    return iter(owners.values())


def _lies_in(name: str, place: str) -> bool:
    return not place or name == place or name.startswith(place + ".")
