"""A model to be asked, exported or measured: of a run's folder, an adapter's, a model's, or a name."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import transformers

from automodel_accel.checkpoint import Checkpoints
from automodel_accel.freezing import Freezing
from automodel_accel.parallel.mesh import Mesh
from automodel_accel.recipes.loading import (
    AUTO,
    IMAGES,
    TEXT,
    device_of,
    dtype_of,
    load_config,
    load_model,
    located,
    task_of,
)
from automodel_accel.recipes.recipe import Model, Recipe, load

logger = logging.getLogger("automodel_accel")
RECIPE, MODEL, CHECKPOINTS, ADAPTER = "recipe.yaml", "model", "checkpoints", "adapter_config.json"


@dataclass(slots=True)
class Opened:
    """What a name stands for.

    Attributes:
        name: As it was given.
        model: In eval mode, on this machine's device; with an adapter, PEFT's around it.
        tokenizer: Tokenizer, or processor where it takes images; None where there is none.
        recipe: Of the run that made it; None where it was not made by one.
    """

    name: str
    model: Any
    tokenizer: Any
    recipe: Recipe | None


def open_model(name: str, *, base: bool = False, step: int | None = None, dtype: str = "auto") -> Opened:
    """Load it.

    Args:
        name: The folder of a run, of an adapter, or of a model; a hub id; or demo:NAME.
        base: What was trained, as it was before.
        step: Of a run: the checkpoint of that step, instead of what it exported.
        dtype: Of the parameters; "auto": bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ValueError: there is no such thing, or it cannot be read.
    """
    folder = Path(name).expanduser()
    if (folder / RECIPE).is_file():
        return _of_run(name, folder, base, step, dtype)
    if step is not None:
        raise ValueError(f"{name}: a step is of a run's folder, with {RECIPE} and {CHECKPOINTS}; there is none.")
    if (folder / ADAPTER).is_file():
        return _of_adapter(name, folder, base, dtype)
    return Opened(name, _plain(Model(path=name, dtype=dtype)), _reader(located(name)), None)  # type: ignore[arg-type]


def _of_run(name: str, folder: Path, base: bool, step: int | None, dtype: str) -> Opened:
    recipe = load(folder / RECIPE)
    made = replace(recipe.model, dtype=dtype)  # type: ignore[arg-type]
    reader = _reader(located(recipe.model.tokenizer or recipe.model.path))
    exported = folder / MODEL
    if base:
        return Opened(name, _plain(made, task_of(recipe)), reader, recipe)
    if step is None and exported.is_dir():
        if recipe.lora is None:
            exact = Model(path=str(exported), dtype=dtype)  # type: ignore[arg-type]
            return Opened(name, _plain(exact, task_of(recipe)), reader, recipe)
        model = peft.PeftModel.from_pretrained(_plain(made, task_of(recipe)), str(exported)).eval()
        return Opened(name, model, reader, recipe)
    return Opened(name, _of_checkpoint(recipe, folder, step), reader, recipe)


def _of_checkpoint(recipe: Recipe, folder: Path, step: int | None) -> Any:
    """Built as for training, in one process and without kernels, and filled from the checkpoint."""
    alone = replace(
        recipe,
        accel=False,
        fp8=None,
        distillation=None,
        mesh=Mesh(),
        model=replace(recipe.model, freeze=Freezing()),
    )
    model = load_model(alone, alone.mesh.ranks())
    if recipe.model.freeze.parts():  # what a checkpoint holds depends on what trained
        from automodel_accel.freezing import freeze

        freeze(model, *recipe.model.freeze.parts())
    with Checkpoints(folder / CHECKPOINTS, signals=(), asynchronous=False) as checkpoints:
        if checkpoints.load(model=model, step=step, random_state=False) is None:
            raise ValueError(f"{folder / CHECKPOINTS} holds no checkpoint; the run has not come to one.")
    return model.eval()


def _of_adapter(name: str, folder: Path, base: bool, dtype: str) -> Opened:
    of = peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not of:
        raise ValueError(
            f"{name} does not name its base model; merge it first: automodel-accel merge {name} --base ..."
        )
    model = _plain(Model(path=of, dtype=dtype))  # type: ignore[arg-type]
    reader = _reader(str(folder)) or _reader(located(of))
    return Opened(name, model if base else peft.PeftModel.from_pretrained(model, str(folder)).eval(), reader, None)


def _plain(made: Model, task: str | None = None) -> Any:
    config = load_config(made)
    auto = AUTO[task or (IMAGES if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else TEXT)]
    if made.weights == "random":
        return auto.from_config(config, dtype=dtype_of(made)).eval()
    try:
        model = auto.from_pretrained(located(made.path), dtype=dtype_of(made), trust_remote_code=made.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{made.path}: {' '.join(str(error).split())[:400]}") from error
    return model.to(device_of(Mesh().sized(1).ranks())).eval()


def _reader(source: str) -> Any:
    """Processor or tokenizer, if there is one."""
    try:
        return transformers.AutoProcessor.from_pretrained(source)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.debug("%s: %s", source, error)
        return None
