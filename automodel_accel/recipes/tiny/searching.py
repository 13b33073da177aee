"""Searches for a way to build a tiny model of a type that trains, and batches for it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedModel,
)

from automodel_accel.recipes.tiny import images
from automodel_accel.recipes.tiny.building import ATTEMPTS, BUILD_ERRORS, Type, make_model, repaired
from automodel_accel.recipes.tiny.images import Look
from automodel_accel.recipes.tiny.shrink import Rules
from automodel_accel.recipes.tiny.text import text_batch

AUTO_CLASSES = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING, "vlm": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}


class Unbuildable(Exception):
    """No tiny model of the type can be built and trained; says why."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a type is built.

    Attributes:
        attempt: Index into `ATTEMPTS`.
        repairs: Attributes that its configuration class lacks.
        image: How images are given; None without.
        blind: Why there is no image, of a vision-language model.
    """

    attempt: int = 0
    repairs: Mapping[str, Any] = field(default_factory=dict)
    image: Look | None = None
    blind: str | None = None

    def rules(self) -> Rules:
        """The rules to shrink by."""
        return replace(ATTEMPTS[self.attempt], repairs=self.repairs)


@dataclass
class Tiny:
    """A tiny model in training mode without dropout, and its batches."""

    type: Type
    model: PreTrainedModel
    image: Look | None
    rules: Rules = field(default_factory=Rules)

    @property
    def has_image(self) -> bool:
        """Whether batches have an image whose pixels reach the loss."""
        return self.image is not None

    def batch(self, rows: int = 2, tokens: int = 24, ignored: int = 5, seed: int = 0) -> dict[str, Any]:
        """A training batch: `tokens` tokens of text a row, after as many image tokens as the model asks for."""
        text = text_batch(self.model, rows, tokens, ignored, seed)
        return text if self.image is None else images.with_image(self.model, text, self.image, seed)

    def save(self, folder: Path) -> None:
        """As `save_pretrained`, with a config that leads transformers' auto classes to this class again."""
        self.model.save_pretrained(folder)
        part = self.model.config
        if part.__class__ in AUTO_CLASSES[self.type.kind]:
            return
        whole = self.type.whole(self.rules)
        setattr(
            whole, next(name for name in whole.sub_configs if isinstance(getattr(whole, name), part.__class__)), part
        )
        whole.save_pretrained(folder)


def build(type: Type, way: Way, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tiny:
    """The model of a type in this way; the same weights for the same seed. Raises `Unbuildable`."""
    try:
        model = make_model(type, way.rules(), seed, dtype)
    except BUILD_ERRORS as error:
        raise Unbuildable(_line(error)) from error
    return Tiny(type, model, way.image, way.rules())


def find_way(type: Type) -> Way:
    """Search for a way to build a type that trains, with an image if possible. Raises `Unbuildable` with the first reason."""
    first: BaseException | None = None
    for attempt, rules in enumerate(ATTEMPTS):
        while True:
            try:
                return _try(type, attempt, rules)
            except BUILD_ERRORS as error:
                better = repaired(rules, error)
                if better is None:
                    first = first or error
                    break
                rules = better
    assert first is not None
    raise Unbuildable(_line(first)) from first


def _try(type: Type, attempt: int, rules: Rules) -> Way:
    """Train on text, and on an image where the type may take one: one of them must work."""
    model = make_model(type, rules, seed=0)
    text = text_batch(model, rows=2, tokens=24, ignored=5, seed=0)
    on_text = _failure(model, text)
    if on_text is not None and repaired(rules, on_text):
        raise on_text
    if on_text is None and type.kind == "causal":
        return Way(attempt, rules.repairs)
    try:
        look = images.find_look(model, text)
        train(copy.deepcopy(model), images.with_image(model, text, look, seed=0))
    except BUILD_ERRORS as error:
        if on_text is None:
            return Way(attempt, rules.repairs, blind=_line(error))
        if type.kind == "causal":
            raise on_text from None
        raise (
            error if repaired(rules, error) else ValueError(f"{_line(on_text)}; with an image {_line(error)}")
        ) from error
    return Way(attempt, rules.repairs, look)


def _failure(model: PreTrainedModel, batch: Mapping[str, Any]) -> Exception | None:
    try:
        train(copy.deepcopy(model), batch)
    except BUILD_ERRORS as error:
        return error
    return None


def train(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor:
    """The loss of one forward and backward; raises where loss or a gradient is not finite."""
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError("the output has no loss")
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {float(loss.detach())}")
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:
        raise ValueError("no parameter has a gradient")
    if not all(torch.isfinite(gradient).all() for gradient in gradients):
        raise ValueError("a gradient is not finite")
    return loss.detach()  # type: ignore[no-any-return]


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in f"{error.__class__.__name__}: {error}".splitlines() if line.strip()]
    return " ".join(lines[:2])[:200]
