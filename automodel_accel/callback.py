"""AccelCallback: `apply` for transformers' Trainer, and its figures in the Trainer's own log.

    Trainer(model=..., args=..., callbacks=[AccelCallback()])

Applied at the end of `Trainer.__init__`: the model is placed, the optimizer is not built and nothing is wrapped yet. Each log of
a training loss then also has, for the steps since the log before and for this process:

    tokens_per_second_per_device        tokens (no padding) by the time of the three below
    label_tokens_per_second_per_device  those of them that have a label
    mfu                                 share of the data sheet's 16-bit rate; of listed devices, in 16 bits (flops.py)
    peak_memory_gb                      1e9 bytes, since the process began: on CUDA by torch's allocator, else by the process
    materialised_logits                 training steps that built real logits; 0 is the aim
    seconds_data                        per step: waiting for the batches of the step
    seconds_forward_backward            per step: all micro-batches, clipping included
    seconds_optimizer                   per step: optimizer, scheduler and clearing the gradients

Evaluation, saving and logging are in none of them. On CUDA the times are between events on the stream, read when they have
passed: no step waits for the GPU.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from automodel_accel.api import apply, find_report, plan
from automodel_accel.config import AccelConfig
from automodel_accel.kernels.facts import Facts, this_machine
from automodel_accel.patches.loss import loss_only
from automodel_accel.trainer_meter import TrainerMeter

logger = logging.getLogger("automodel_accel")
MOVE = "pass it to the Trainer instead: Trainer(..., callbacks=[AccelCallback()])"
NAMES_SHOWN = 5


class AccelCallback(TrainerCallback):
    """Applies automodel_accel to a Trainer's model, and adds speed, memory and time to the Trainer's log.

    Args:
        config: As for `apply`.
        facts: As for `apply`.
        **fusions: As for `apply`: `norm="torch"`, `loss=False`, `strict=True`.

    Raises:
        ValueError: when it is made, an unknown setting; when the Trainer is built, what `apply` raises, or a Trainer that applies
            Liger; when training begins, a callback that was added too late, or an optimizer that holds replaced parameters.
    """

    def __init__(
        self, config: AccelConfig | dict[str, Any] | None = None, *, facts: Facts | None = None, **fusions: Any
    ) -> None:
        self._settings = AccelConfig.build(config, **fusions)
        self._facts = facts
        self._meter: TrainerMeter | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Apply, and stand before the callbacks that report."""
        self._settle(args, _calling_trainer())
        self._apply(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply where that was not done and still can be, check the optimizer, and begin to measure."""
        self._stop()
        trainer, model = _calling_trainer(), kwargs["model"]
        self._settle(args, trainer)
        if find_report(model) is None and (reason := _too_late(model, trainer)) is not None:
            raise ValueError(f"AccelCallback was added after the Trainer was built, and {reason}; {MOVE}.")
        self._apply(model)
        check_optimizer(model, kwargs.get("optimizer"))
        done = find_report(model)
        assert done is not None
        if trainer is None:
            logger.warning(
                "no transformers Trainer calls this AccelCallback: tokens and the time of loading data are not measured, and "
                "callbacks that come before it do not see its figures."
            )
        self._meter = TrainerMeter(args, model, trainer, done, self._facts or this_machine())
        self._meter.watch_batches()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the Trainer."""
        self._stop()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where nobody watches the batches, a step begins here."""
        if self._meter is not None and not self._meter.sees_batches:
            self._meter.begin()
            self._meter.receive([])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End of forward and backward."""
        if self._meter is not None:
            self._meter.update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End of the step."""
        if self._meter is not None:
            self._meter.end()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the figures to a log of the training loss, and to the copy of it that the Trainer keeps."""
        logs = kwargs.get("logs")
        if self._meter is None or logs is None or "loss" not in logs:
            return
        figures = self._meter.figures()
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def _settle(self, args: TrainingArguments, trainer: Any) -> None:
        """Refuse Liger, and take the first place among the Trainer's callbacks."""
        if args.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True and AccelCallback would both change this model; expected one of them. Leave "
                'use_liger_kernel out (AccelCallback(implementation="liger") takes Liger\'s kernels where they serve), or leave '
                "AccelCallback out."
            )
        if trainer is None:
            return
        others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
        if any(isinstance(other, AccelCallback) for other in others):
            raise ValueError("this Trainer has two AccelCallbacks; expected one. Leave one of them out.")
        # W&B's and TensorBoard's callbacks come first otherwise, and report what `logs` holds then. A new list: the handler may
        # be walking along the old one
        trainer.callback_handler.callbacks = [self, *others]
        if type(trainer).prediction_step in _TAKE_THE_LOSS and "prediction_step" not in vars(trainer):
            trainer.prediction_step = functools.partial(_predict, trainer.prediction_step)
        if trainer.model_init is not None and getattr(trainer.call_model_init, "func", None) is not _new_model:
            # train() makes another model, of which no callback hears before the optimizer and the wrappers are built
            trainer.call_model_init = functools.partial(_new_model, self, trainer.call_model_init)

    def _apply(self, model: nn.Module) -> None:
        """Apply to a model that is not; quiet about one that is, unless it was asked for other settings."""
        if find_report(model) is None:
            apply(model, self._settings, facts=self._facts)
        elif self._settings != AccelConfig():
            plan(model, self._settings)  # raises where the settings are not those of the model

    def _stop(self) -> None:
        if self._meter is not None:
            self._meter.unwatch()
        self._meter = None


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Whether an optimizer holds the parameters of the model that train.

    Parameters that it does not hold are logged: some train a part of a model on purpose.

    Raises:
        ValueError: it holds parameters in place of those of the model, or none that train.
    """
    groups = getattr(optimizer, "param_groups", None) or []
    held = {id(parameter): parameter for group in groups for parameter in group["params"]}
    own = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    if not missing or _is_flattened(model):
        return
    ids = {id(parameter) for parameter in own.values()}
    # copies of parameters (in higher precision, in flat shards) and stand-ins are plain tensors
    strangers = [p for p in held.values() if id(p) not in ids and isinstance(p, nn.Parameter)]
    held_here = [p for p in held.values() if id(p) in ids]
    if strangers or (held_here and len(missing) == len(trained)):
        instead = f"{len(strangers)} parameters that are not in the model" if strangers else "none that train"
        raise ValueError(
            f"the optimizer was built before parameters of the model were replaced: it does not hold {_some(missing)}, but "
            f"{instead}, so that these would never move. Leave `optimizers` out of Trainer(...), or build the optimizer from the "
            "model that you give to the Trainer, after the last change of its parameters."
        )
    if held_here:
        logger.warning("the optimizer does not hold %s, which require gradients; they will not move.", _some(missing))


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _is_flattened(model: nn.Module) -> bool:
    """FSDP1 trains flat parameters, of which the model's are views."""
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


# what they return of the outputs is the loss alone where prediction_loss_only is True
_TAKE_THE_LOSS = (Trainer.prediction_step, Seq2SeqTrainer.prediction_step)


def _predict(
    step: Callable[..., Any], model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
) -> Any:
    with loss_only(model) if prediction_loss_only else nullcontext():
        return step(model, inputs, prediction_loss_only, *args, **kwargs)


def _new_model(callback: AccelCallback, call_model_init: Callable[..., nn.Module], *args: Any) -> nn.Module:
    model = call_model_init(*args)
    callback._apply(model)
    return model


def _calling_trainer() -> Any:
    """The Trainer whose method called a callback, or None in another loop.

    The events carry no Trainer, but its list of callbacks and its batches are needed. So it is looked for among the callers:
    the nearest method of a Trainer. Locals are read of methods only, since reading them prolongs their life.
    """
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            caller = frame.f_locals.get("self")
            if isinstance(caller, Trainer):
                return caller
        frame = frame.f_back
    return None


def _too_late(model: nn.Module, trainer: Trainer | None) -> str | None:
    """Why `apply` would be wrong, or refused, when training begins; None where it is right."""
    if trainer is not None and trainer.model_wrapped is not trainer.model:
        return f"the model is in a {type(trainer.model_wrapped).__name__} already"
    if _is_flattened(model) or any(hasattr(parameter, "placements") for parameter in model.parameters()):
        return "the model is sharded already"
    replaced = next((path for path, module in model.named_modules() if "forward" in vars(module)), None)
    if replaced is not None:
        return f"the forward of {replaced or 'the model'} is replaced already (mixed precision does that)"
    return None
