"""A trial: the first steps of a recipe with a tiny model of the same type, on random tokens and images.

Everything else is the recipe's: frozen parts, adapters, quantisation, what is applied, the loss, the optimizer, the schedule, the
average, and the loop itself. What has to be smaller for a tiny model is told.
"""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING

from automodel_accel.data.counts import Counts
from automodel_accel.data.loader import Filled, Loader
from automodel_accel.data.sample import IGNORED, Sample
from automodel_accel.data.settings import MockData
from automodel_accel.data.windows import AtHand
from automodel_accel.demo import is_demo, resolve
from automodel_accel.freezing import AUDIO, find_parts
from automodel_accel.parallel.mesh import Mesh
from automodel_accel.recipes.building import build
from automodel_accel.recipes.loading import IMAGES, TEXT, dtype_of, load_config, task_of
from automodel_accel.recipes.recipe import Lora, Model, Recipe
from automodel_accel.recipes.tiny import Found, Tiny, UnknownModel, find_type, tiny
from automodel_accel.recipes.tiny.building import Type
from automodel_accel.recipes.tiny.configuration import default_config
from automodel_accel.report import Report
from automodel_accel.train.logs import TRAINING, Logging
from automodel_accel.train.loop import train
from automodel_accel.train.run import Run

STEPS, ROWS, LENGTH, RANK = 2, 2, 64, 4
MODEL, TEACHER = "model", "teacher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What was tried.

    Attributes:
        found: The type, and where it is known from.
        model: The tiny model, trained.
        report: What `apply` did to it; None where the recipe wants nothing applied.
        rows: Of training.jsonl, one a step.
        saw_images: Whether batches had images whose pixels reach the loss.
        changed: What of the recipe a tiny model cannot be given as it is, in words.
    """

    found: Found
    model: nn.Module
    report: Report | None
    rows: tuple[dict[str, Any], ...]
    saw_images: bool
    changed: tuple[str, ...]


def try_out(recipe: Recipe, folder: Path) -> Trial:
    """Train two steps; needs no network, no weights and no data.

    Args:
        recipe: Any.
        folder: An empty one, for the tiny model and what the run leaves.

    Raises:
        UnknownModel: the model's type is not known, or transformers does not have it.
        ValueError: what the recipe asks for does not work.
        FloatingPointError: the loss is not finite.
    """
    found, task = find_model(recipe.model, task_of(recipe), folder)
    made = tiny(found.type, dtype=dtype_of(recipe.model))
    said = io.StringIO()  # lines and bars of the loop and of transformers: the rows say the same
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        made.save(folder / MODEL)
        smaller, changed = _smaller(recipe, task, made.model, folder)
        run = build(smaller, smaller.mesh.ranks())
        sees = recipe.has_images and made.has_image
        run.data = _Images(made, smaller, run) if sees else _text(smaller, run)
        train(run)
    lines = (run.folder / TRAINING).read_text(encoding="utf-8").splitlines()
    rows = tuple(json.loads(line) for line in lines)
    return Trial(found=found, model=run.model, report=run.report, rows=rows, saw_images=sees, changed=changed)


def find_model(model: Model, task: str, folder: Path) -> tuple[Found, str]:
    """The type of a recipe's model, its config changed as the recipe wants it; and the task, which is the other where the type has
    no class for this one and the recipe leaves it open.

    Raises:
        UnknownModel: as `find_type`.
        ValueError: a setting that its config does not have.
    """
    path = str(resolve(model.path)) if is_demo(model.path) else model.path
    try:
        found = find_type(path, task)
    except UnknownModel:
        other = TEXT if task == IMAGES else IMAGES
        if model.task != "auto" or not _has(path, other):
            raise
        found, task = find_type(path, other), other
    if not model.config:
        return found, task
    source = found.type.source or default_config(CONFIG_MAPPING[found.type.name])
    source.save_pretrained(folder / "config")
    changed = load_config(replace(model, path=str(folder / "config"), revision=None))
    return replace(found, type=Type(found.type.name, found.type.kind, changed)), task


def _has(path: str, task: str) -> bool:
    try:
        find_type(path, task)
    except UnknownModel:
        return False
    return True


def _smaller(recipe: Recipe, task: str, made: Any, folder: Path) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe for the tiny model, and what had to change beside the model, the data and the number of steps."""
    changed: list[str] = []
    model = _with_ears(_model(recipe.model, folder / MODEL, task, changed), made, changed)
    rows = min(recipe.batching.batch_size, ROWS)
    accumulates = recipe.training.global_batch_size > recipe.batching.batch_size
    batching = replace(
        recipe.batching, seq_length=min(recipe.batching.seq_length, LENGTH), batch_size=rows, window=64, prefetch=0
    )
    teacher = recipe.distillation
    if teacher is not None:
        of_teacher, _ = find_model(teacher.teacher, TEXT, folder)
        tiny(of_teacher.type, dtype=dtype_of(teacher.teacher), seed=1).save(folder / TEACHER)
        teacher = replace(teacher, teacher=_model(teacher.teacher, folder / TEACHER, TEXT, changed))
    if recipe.mesh != Mesh():
        changed.append("the mesh is checked and not run: the trial has one process")
    smaller = replace(
        recipe,
        model=model,
        data=MockData(vocab_size=_vocabulary(made), samples=8, shortest=2),
        validation={},
        batching=batching,
        lora=None if recipe.lora is None else _lora(recipe.lora, changed),
        mesh=Mesh(shard=1, reduce_dtype=None),
        schedule=replace(recipe.schedule, warmup=min(recipe.schedule.warmup, 1.0), decay=_share(recipe.schedule.decay)),
        training=replace(
            recipe.training,
            steps=STEPS,
            epochs=None,
            global_batch_size=rows * (2 if accumulates else 1),
            validate_every=None,
        ),
        distillation=teacher,
        checkpoint=replace(recipe.checkpoint, every=None, asynchronous=False, resume="auto", export=False, signals=()),
        logging=Logging(),
        output=folder / "run",
    )
    return smaller, tuple(dict.fromkeys(changed))


def _with_ears(model: Model, made: Any, changed: list[str]) -> Model:
    """Without freezing an audio tower that only some models of the type have, and the tiny one has not."""
    may_hear = any("audio" in name or "sound" in name for name in getattr(type(made.config), "sub_configs", {}))
    if not (model.freeze.audio_tower and may_hear and AUDIO in find_parts(made).missing):
        return model
    changed.append("the tiny model has no audio tower to freeze")
    return replace(model, freeze=replace(model.freeze, audio_tower=False))


def _share(decay: float) -> float:
    return decay if decay < 1 else 0.5


def _model(model: Model, path: Path, task: str, changed: list[str]) -> Model:
    if model.trust_remote_code:
        changed.append("trust_remote_code: the class of transformers is tried, not the model's own code")
    attention = model.attn_implementation
    if attention is not None and attention not in ("sdpa", "eager", "flex_attention"):
        changed.append(f"attn_implementation {attention} is checked and not run")
        attention = None
    return replace(
        model,
        path=str(path),
        task=task,  # type: ignore[arg-type]  # one of the two that it may be
        config={},
        tokenizer=None,
        revision=None,
        trust_remote_code=False,
        attn_implementation=attention,
    )


def _lora(lora: Lora, changed: list[str]) -> Lora:
    """With a rank that fits the smallest linear of a tiny model."""
    ranks = dict(lora.settings.get("rank_pattern") or {})
    if lora.r <= RANK and all(rank <= RANK for rank in ranks.values()):
        return lora
    changed.append(f"LoRA has rank {min(lora.r, RANK)} instead of {lora.r}")
    settings = dict(lora.settings)
    if ranks:
        settings["rank_pattern"] = {name: min(rank, RANK) for name, rank in ranks.items()}
    return replace(lora, r=min(lora.r, RANK), settings=settings)


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


class _Tokens:
    """Samples of tokens from the upper half of the vocabulary, where no tiny model has its special ones."""

    def __init__(self, vocabulary: int, length: int, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shortest = max(2, length // 4)
        lengths = torch.randint(shortest, length + 1, (count,), generator=generator).tolist()
        self._samples = [
            torch.randint(vocabulary // 2, vocabulary, (each,), generator=generator).tolist() for each in lengths
        ]

    def __len__(self) -> int:
        return len(self._samples)

    def length(self, number: int) -> int:
        """Tokens of a sample."""
        return len(self._samples[number])

    def documents(self, number: int) -> Sequence[Sample]:
        """The sample, as a list of one; half of it carries loss."""
        tokens = self._samples[number]
        half = len(tokens) // 2
        return [Sample(tokens, [IGNORED] * half + tokens[half:])]


def _text(recipe: Recipe, run: Run) -> Loader:
    """Packed or padded as the recipe says."""
    batching = recipe.batching
    rows = 4 * recipe.training.global_batch_size * STEPS
    inner: Any = run.model
    vocabulary = inner.config.get_text_config().vocab_size
    samples = _Tokens(vocabulary, batching.seq_length, rows)
    return Loader(AtHand(samples, batching, False, 0), batching, 0, epochs=None)


class _Images:
    """Batches with an image in each row, in the shape that the tiny model takes; what the loop asks of a loader."""

    def __init__(self, made: Tiny, recipe: Recipe, run: Run) -> None:
        self.epoch, self.filled, self.counts = 0, Filled(), Counts()
        self._made, self._rows, self._number = made, recipe.batching.batch_size, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            batch = self._made.batch(rows=self._rows, tokens=LENGTH // 2, seed=self._number)
            self._number += 1
            self.filled.tokens += batch["labels"].numel()
            self.filled.label_tokens += int((batch["labels"] != IGNORED).sum())
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint at the end."""
        return {"number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place."""
        self._number = int(state["number"])
