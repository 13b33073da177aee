"""A model to be asked, exported or measured: of a run's folder, an adapter's, a model's, or a name."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from automodel_accel.checkpoint import Checkpoints, catalog, loading, state
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
from automodel_accel.train.average import ParameterAverage

logger = logging.getLogger("automodel_accel")
RECIPE, MODEL, CHECKPOINTS, ADAPTER = "recipe.yaml", "model", "checkpoints", "adapter_config.json"
STORED = "stored"  # of a dtype: what lies in the files


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
        dtype: Of the parameters; "auto": as the recipe of a run says, else bfloat16 on a GPU, float32 on a CPU; "stored": as they
            lie in their files.

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
    return Opened(name, _plain(_typed(Model(path=name), dtype)), _reader(located(name)), None)


def _of_run(name: str, folder: Path, base: bool, step: int | None, dtype: str) -> Opened:
    recipe = load(folder / RECIPE)
    made = _typed(recipe.model, recipe.model.dtype if dtype == "auto" else dtype)
    reader = _reader(located(recipe.model.tokenizer or recipe.model.path))
    exported = folder / MODEL
    if base:
        return Opened(name, _plain(made, task_of(recipe)), reader, recipe)
    if step is None and exported.is_dir():
        if recipe.lora is None:
            exact = _typed(Model(path=str(exported)), dtype if dtype == STORED else made.dtype)
            return Opened(name, _plain(exact, task_of(recipe)), reader, recipe)
        model = peft.PeftModel.from_pretrained(_plain(made, task_of(recipe)), str(exported)).eval()
        return Opened(name, model, reader, recipe)
    model = _of_checkpoint(replace(recipe, model=made), folder, step)
    if recipe.lora is None and dtype != STORED:
        model = model.to(dtype_of(made))
    return Opened(name, model, reader, recipe)


def _of_checkpoint(recipe: Recipe, folder: Path, step: int | None) -> Any:
    """Built as for training, in one process and without kernels, and filled from the checkpoint, in the dtypes that it was saved in;
    with the averages of the parameters where the run has such, as those are what it validates and exports."""
    alone = replace(recipe, accel=False, fp8=None, distillation=None, mesh=Mesh())
    model = load_model(alone, alone.mesh.ranks())
    _take_dtypes(model, folder / CHECKPOINTS, step)
    optimizers, average = [], None
    if recipe.training.average is not None:  # saved as an optimizer, beside the other
        average = ParameterAverage(model.parameters(), recipe.training.average)
        optimizers = [recipe.optimizer.build(model.named_parameters()), average]
    with Checkpoints(folder / CHECKPOINTS, signals=(), asynchronous=False) as checkpoints:
        restored = checkpoints.load(model=model, optimizer=optimizers or None, step=step, random_state=False)
        if restored is None:
            raise ValueError(f"{folder / CHECKPOINTS} holds no checkpoint; the run has not come to one.")
    if average is not None:
        average.write()
    return model.eval()


def _take_dtypes(model: Any, folder: Path, step: int | None) -> None:
    """A run of another machine may have trained in another dtype than "auto" is here."""
    found = [entry for entry in catalog.entries(folder)[0] if step in (None, entry.step)]
    if not found:
        return  # said where it is loaded
    _, stores = loading.read_state(found[0])
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in stores["model"]:
            tensor.data = tensor.data.to(state.TORCH_DTYPES[stores["model"][name].dtype])


def _typed(model: Model, dtype: str) -> Model:
    """With a dtype; STORED: that of its config."""
    if dtype == STORED:
        dtype = str(load_config(model).dtype or torch.float32).removeprefix("torch.")
    return replace(model, dtype=dtype)  # type: ignore[arg-type]


def _of_adapter(name: str, folder: Path, base: bool, dtype: str) -> Opened:
    of = peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not of:
        raise ValueError(
            f"{name} does not name its base model; merge it first: automodel-accel merge {name} --base ..."
        )
    model = _plain(_typed(Model(path=of), dtype))
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
