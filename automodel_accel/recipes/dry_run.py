"""A dry run: all that a recipe asks for, built on meta and told on one screen, before anything is read or trained.

    found = dry_run(load(Path("recipe.yaml")), world_size=8)
    print(found)

With `tiny=True` the model is a tiny one of the same type, which is trained for two steps; that needs no network.
"""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.utils import CONFIG_NAME

from automodel_accel.adapters import with_lora
from automodel_accel.api import plan
from automodel_accel.freezing import freeze, lora_exclusion
from automodel_accel.kernels.facts import this_machine
from automodel_accel.parallel.mesh import Mesh, Ranks
from automodel_accel.patches.probe import PROBE_ERRORS
from automodel_accel.plan import Plan
from automodel_accel.recipes.building import micro_batches
from automodel_accel.recipes.findings import (
    Problem,
    problems_of_data,
    problems_of_packages,
    problems_of_shape,
    problems_of_tokenizer,
)
from automodel_accel.recipes.loading import AUTO, dtype_of, load_config, located, task_of
from automodel_accel.recipes.recipe import Recipe
from automodel_accel.recipes.running import check_folder
from automodel_accel.recipes.telling import (
    Line,
    accel_line,
    batch_line,
    checkpoint_line,
    data_line,
    logging_line,
    many,
    memory_line,
    mesh_line,
    model_line,
    optimizer_line,
    sheet,
    steps_line,
    steps_of,
    trained_line,
    trial_line,
    wrapped,
)
from automodel_accel.recipes.tiny import UnknownModel
from automodel_accel.recipes.trial import Trial, try_out
from automodel_accel.scaling.answers import GIB, Answer, Question, answer
from automodel_accel.tables import table

# what it has in common with those that the estimate knows; None: its states are left out, and that is said
COUNTED_AS = {"adamw": "adamw", "adam": "adamw", "sgd": "sgd_momentum", "adafactor": None, "adamw8bit": None}
GRAVEST = ("error", "missing", "note")
RESERVE = 0.1  # of a GPU's memory, for what is not counted
# what a model's own code may raise, given a config or a batch that it was not written for
CANNOT_BE = (*PROBE_ERRORS, StrictDataclassError, ImportError, FloatingPointError)


@dataclass(frozen=True, slots=True)
class DryRun:
    """What was found. `print` it; `to_json()` for machines.

    Attributes:
        title: What was done.
        lines: What the run would be, in the order in which they are told.
        problems: All of them, the gravest first.
    """

    title: str
    lines: tuple[Line, ...]
    problems: tuple[Problem, ...]

    @property
    def exit_code(self) -> int:
        """2 where the run would stop, else 0."""
        return 2 if any(problem.kind == "error" for problem in self.problems) else 0

    def __str__(self) -> str:
        rows = [(one.kind, one.where, one.said) for one in self.problems]
        found = "\n" + table("Found", ("", "where", "what"), rows) if rows else ""
        title = "\n".join(wrapped(self.title))
        return f"{title}\n\n{sheet(self.lines)}\n{found}\n{self._end()}"

    def _end(self) -> str:
        kinds = Counter(problem.kind for problem in self.problems)
        if kinds["error"]:
            return f"{many(kinds['error'], 'error')}: the run would stop."
        if kinds["missing"]:
            return (
                f"The recipe works with a tiny model; the run would stop at {many(kinds['missing'], 'missing thing')}."
            )
        return "Nothing was found that would stop the run."

    def to_dict(self) -> dict[str, Any]:
        """Plain data: a mapping for each line, and the problems."""
        problems = [{"where": one.where, "said": one.said, "kind": one.kind} for one in self.problems]
        return {**{line.name: dict(line.data) for line in self.lines}, "problems": problems}

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def dry_run(recipe: Recipe, *, tiny: bool = False, world_size: int | None = None) -> DryRun:
    """Build what a recipe asks for without weights and without data, and list all problems at once.

    Args:
        recipe: With or without an output.
        tiny: Take a tiny model of the same type and train it for two steps, on random tokens: it needs no network, and what the
            machine lacks (files, tokenizer, trackers) is a note.
        world_size: Processes; None for as many as the mesh names.
    """
    running = _Running(recipe, tiny, world_size)
    running.mesh()
    trial = running.tried() if tiny else None
    model = trial.model if trial is not None else None if tiny else running.attempt("model.path", running.built)
    running.tell(model, trial)
    problems = sorted(dict.fromkeys(running.problems), key=lambda problem: GRAVEST.index(problem.kind))
    name = str(recipe.output) if recipe.output is not None else recipe.model.path
    how = "a tiny model of its type, trained for two steps" if tiny else "built on meta; nothing was read or trained"
    return DryRun(f"Dry run of {name}: {how}", tuple(running.lines), tuple(problems))


class _Running:
    """The lines and the problems as they are found."""

    def __init__(self, recipe: Recipe, tiny: bool, world_size: int | None) -> None:
        self.recipe, self.tiny = recipe, tiny
        self.facts = this_machine()
        self.lines: list[Line] = []
        self.problems: list[Problem] = []
        self.world_size = _named(recipe.mesh) if world_size is None else world_size
        self.sized: Mesh | None = None
        self.accumulate: int | None = None

    def attempt(self, where: str, make: Callable[[], Any]) -> Any:
        """What it makes, or None and a problem."""
        try:
            return make()
        except (ValueError, *CANNOT_BE) as error:
            said = " ".join(str(error).split()).removeprefix(f"{where} ").rstrip(".")
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self.problems.append(Problem("model.path" if isinstance(error, UnknownModel) else where, f"{kind}{said}"))
            return None

    def add(self, where: str, make: Callable[[], Line]) -> None:
        """A line, or a problem."""
        line = self.attempt(where, make)
        if line is not None:
            self.lines.append(line)

    def list(self, problems: Iterable[Problem]) -> None:
        """Add problems."""
        self.problems += problems

    def mesh(self) -> None:
        """Lay the processes out, and cut the batch of a step for them."""
        sized = self.attempt("mesh", lambda: self.recipe.mesh.sized(self.world_size))
        if sized is not None:
            ranks, self.sized = Ranks(sized, None), sized
            self.accumulate = self.attempt("training.global_batch_size", lambda: micro_batches(self.recipe, ranks))

    def tried(self) -> Trial | None:
        """Two steps of a tiny model."""
        with tempfile.TemporaryDirectory() as folder:
            return self.attempt("tried", lambda: try_out(self.recipe, Path(folder)))  # type: ignore[no-any-return]

    def built(self) -> nn.Module:
        """On meta, frozen and with adapters."""
        config = _config(self.recipe)
        self.list(problems_of_shape(self.recipe, config))
        attention = self.recipe.model.attn_implementation
        # meta knows nothing of packages: what is missing is listed elsewhere
        chosen = {"attn_implementation": attention} if attention in ("sdpa", "eager") else {}
        with torch.device("meta"):
            model: nn.Module = AUTO[task_of(self.recipe, config)].from_config(
                config, dtype=dtype_of(self.recipe.model), **chosen
            )
        return (
            self.attempt("lora" if self.recipe.lora else "model.freeze", lambda: _adapted(self.recipe, model)) or model
        )

    def tell(self, model: nn.Module | None, trial: Trial | None) -> None:
        """All lines, in their order."""
        recipe, served = self.recipe, None
        if model is not None:
            self.add("model.path", lambda: model_line(recipe, model, trial))
            self.add("model", lambda: trained_line(recipe, model))
            if recipe.accel is not False:
                served = trial.report.plan if trial and trial.report else None
                served = served or self.attempt("accel", lambda: plan(model, recipe.accel_config()))
            self.add("accel", lambda: accel_line(served))
        self.add("data", lambda: data_line(recipe))
        if self.sized is not None:
            mesh = self.sized
            self.add("mesh", lambda: mesh_line(mesh, self.world_size))
            if self.accumulate is not None:
                accumulate = self.accumulate
                self.add("batching", lambda: batch_line(recipe, mesh, accumulate))
        steps = self.attempt("training.steps", lambda: steps_of(recipe, self.sized, self.accumulate))
        self.add("training", lambda: steps_line(recipe, steps))
        self.add("optimizer", lambda: optimizer_line(recipe, None if self.tiny else model, steps))
        self.add("checkpoint", lambda: checkpoint_line(recipe, steps))
        self.add("logging", lambda: logging_line(recipe))
        if model is not None and not self.tiny and self.sized is not None and self.accumulate is not None:
            self.add("memory", lambda: memory_line(self._answer(model, served)))
        if trial is not None:
            self.lines.append(trial_line(trial))
        self._missing()

    def _answer(self, model: nn.Module, served: Plan | None) -> Answer:
        recipe = self.recipe
        counted = COUNTED_AS[recipe.optimizer.kind]
        if counted is None:
            self.list([Problem("optimizer.kind", f"memory leaves out the states of {recipe.optimizer.kind}", "note")])
        if recipe.model.quantize is not None:
            said = f"memory counts the weights as they are before {recipe.model.quantize} rounds them"
            self.list([Problem("model.quantize", said, "note")])
        job = {
            "mesh": self.sized,
            "rows": recipe.batching.batch_size,
            "length": recipe.batching.seq_length,
            "accumulate": self.accumulate,
            "optimizer": counted or "sgd",
        }
        gib = self.facts.memory_bytes / GIB if self.facts.device != "cpu" else None
        return answer(model, served, job, Question(gib=gib, reserve=RESERVE, bandwidth={}))

    def _missing(self) -> None:
        missing = [*problems_of_data(self.recipe, self.facts), *problems_of_packages(self.recipe, self.facts)]
        self.list(replace(one, kind="missing") if self.tiny else one for one in missing)
        if not self.tiny and not any(problem.where == "model.path" for problem in self.problems):
            self.list(problems_of_tokenizer(self.recipe))
        if self.recipe.output is not None:
            self.attempt("output", lambda: check_folder(self.recipe))


def _named(mesh: Mesh) -> int:
    """How many processes the mesh names, one for what it leaves open."""
    return math.prod(max(size, 1) for size in mesh.sizes)


def _config(recipe: Recipe) -> Any:
    """The config of the model; from the cache where it is there, else as it is loaded.

    Raises:
        ValueError: it cannot be had; says what to do instead.
    """
    source = located(recipe.model.path)
    if Path(source).exists():
        return load_config(recipe.model)
    cached = try_to_load_from_cache(source, CONFIG_NAME, revision=recipe.model.revision)
    if isinstance(cached, str):
        return load_config(replace(recipe.model, path=str(Path(cached).parent), revision=None))
    try:
        return load_config(recipe.model)
    except ValueError as error:
        raise ValueError(
            f"{error} Without a network use --tiny, which needs the name alone, or name a folder with a config.json"
        ) from error


def _adapted(recipe: Recipe, model: nn.Module) -> nn.Module:
    parts = recipe.model.freeze.parts()
    config = {} if recipe.lora is None else recipe.lora.config()
    if parts and recipe.lora is not None and recipe.lora.exclude_modules is None:
        config["exclude_modules"] = lora_exclusion(model, *parts)
    if parts:
        freeze(model, *parts)
    return model if recipe.lora is None else with_lora(model, config)
