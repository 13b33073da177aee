"""From a recipe to a run: model, data, optimizer and schedule, checked against each other before the first step."""

import random
from dataclasses import fields, replace
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import nn
from transformers.integrations.neftune import activate_neftune

from automodel_accel.api import find_report
from automodel_accel.data import Batching, open_data
from automodel_accel.evaluation import takes_num_items
from automodel_accel.parallel.in_backward import step_in_backward
from automodel_accel.parallel.mesh import Ranks
from automodel_accel.recipes.filling import to_plain
from automodel_accel.recipes.loading import device_of, load_model, load_teacher, load_tokenizer
from automodel_accel.recipes.recipe import VISION_KINDS, Recipe
from automodel_accel.train.average import ParameterAverage
from automodel_accel.train.distillation import Teacher
from automodel_accel.train.losses import set_loss
from automodel_accel.train.run import Run


def build(recipe: Recipe, ranks: Ranks) -> Run:
    """Load, adapt, apply and spread the model; open the data; make the optimizer.

    Args:
        recipe: With an output.
        ranks: Of `recipe.mesh`.

    Raises:
        ValueError: something that the recipe names does not work, or two of its sections do not fit each other.
    """
    assert recipe.output is not None
    chosen = recipe.training
    accumulate = micro_batches(recipe, ranks)
    _seed(chosen.seed)
    tokenizer = load_tokenizer(recipe)
    placed = {"data_rank": ranks.data_rank, "data_size": ranks.data_size}
    data = _open(recipe.data, tokenizer, recipe.batching, **placed, epochs=_epochs(recipe))
    validation = {
        name: open_source(source, tokenizer, recipe.batching, **placed) for name, source in recipe.held_out.items()
    }
    steps = steps_of(recipe, data, accumulate)
    factors = recipe.schedule.factors(steps)  # its errors come before the model is loaded
    model = load_model(recipe, ranks)
    prepare_loss(recipe, model)
    optimizer = recipe.optimizer.build(model.named_parameters())
    if chosen.step_in_backward:
        step_in_backward(optimizer, model, accumulate=accumulate, max_grad_norm=chosen.max_grad_norm)
    average = None if chosen.average is None else ParameterAverage(model.parameters(), chosen.average)
    run = Run(
        folder=recipe.output,
        recipe=to_plain(recipe),
        model=model,
        report=find_report(model),
        ranks=ranks,
        device=device_of(ranks),
        training=chosen,
        checkpointing=recipe.checkpoint,
        logging=recipe.logging,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, factors),
        average=average,
        steps=steps,
        accumulate=accumulate,
        data=data,
        validation=validation,
        teacher=_teacher(recipe, ranks),
        saves_frozen=recipe.model.weights == "random",
        divides_itself=takes_num_items(model),
        tokenizer=tokenizer,
    )
    _seed(chosen.seed + 1 + ranks.data_rank)  # dropout: ranks that cut a layer draw alike
    return run


def micro_batches(recipe: Recipe, ranks: Ranks) -> int:
    """How many micro-batches of a rank make a step.

    Raises:
        ValueError: the global batch cannot be cut so.
    """
    rows, at_once = recipe.training.global_batch_size, recipe.batching.batch_size * ranks.data_size
    if rows % at_once:
        raise ValueError(
            f"training.global_batch_size is {rows}, but {ranks.data_size} data ranks take {recipe.batching.batch_size} rows at once; "
            f"expected a multiple of {at_once}."
        )
    return rows // at_once


def steps_of(recipe: Recipe, data: Any, accumulate: int) -> int:
    """Optimizer steps of the run.

    Raises:
        ValueError: nobody knows how many there are.
    """
    chosen = recipe.training
    if chosen.steps is not None and chosen.epochs is None:
        return chosen.steps
    try:
        there = -(-len(data) // accumulate)
    except TypeError as error:
        if chosen.steps is not None:
            return chosen.steps
        raise ValueError(
            "training.steps is not given, and how many steps an epoch has is not known, as the data streams; give it, for the schedule."
        ) from error
    return there if chosen.steps is None else min(chosen.steps, there)


def prepare_loss(recipe: Recipe, model: nn.Module) -> None:
    """Label smoothing, z-loss and noise on embeddings, where the recipe wants them."""
    chosen = recipe.training
    if chosen.label_smoothing or chosen.z_loss:
        set_loss(model, label_smoothing=chosen.label_smoothing, z_loss=chosen.z_loss)
    if chosen.neftune_noise_alpha is not None:
        activate_neftune(model, chosen.neftune_noise_alpha)  # type: ignore[no-untyped-call]


def _epochs(recipe: Recipe) -> int | None:
    chosen = recipe.training
    return 1 if chosen.steps is None and chosen.epochs is None else chosen.epochs


def open_source(source: Any, tokenizer: Any, batching: Batching, **placed: Any) -> Any:
    """The batches of a data set that is only asked, in the order of its rows; with images or without.

    Args:
        source: A kind of data.
        tokenizer: Tokenizer, or processor.
        batching: How.
        **placed: `data_rank` and `data_size`.
    """
    return _open(_in_order(source), tokenizer, batching, **placed)


def _open(source: Any, tokenizer: Any, batching: Batching, **placed: Any) -> Any:
    if isinstance(source, VISION_KINDS):
        from automodel_accel.data.vision_loader import open_vision_data

        return open_vision_data(source, tokenizer, batching, **placed)
    return open_data(source, tokenizer, batching, **placed)


def _in_order(source: Any) -> Any:
    """The same rows, in the order of their file."""
    return replace(source, shuffle=False) if any(field.name == "shuffle" for field in fields(source)) else source


def _teacher(recipe: Recipe, ranks: Ranks) -> Any:
    if recipe.distillation is None:
        return None
    wanted = recipe.distillation
    return Teacher(load_teacher(wanted.teacher, ranks), wanted.weight, wanted.temperature)


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def end_processes() -> None:
    """Leave the run together: a rank that goes early takes the others' collectives with it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
