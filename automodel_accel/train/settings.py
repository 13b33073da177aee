"""What a recipe says of a training run besides its model, its data and its optimizer."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How long a run is, and what a step of it does.

    Attributes:
        steps: Optimizer steps; None: those of `epochs`.
        epochs: How often the data is gone through; None: once, or as often as `steps` need. Of both, what ends first ends the run.
        global_batch_size: Rows of an optimizer step, of all ranks and micro-batches together. A micro-batch of a rank has
            `batching.batch_size`; how many are accumulated follows.
        max_grad_norm: Gradients are scaled down to this norm; None leaves them.
        seed: Of everything that is drawn, adapters and dropout; the data has its own.
        validate_every: Steps between two validations; None validates at the end alone.
        autocast: The dtype in which torch's autocast computes; None: in that of the parameters.
        label_smoothing: Share of the target that is spread evenly over the vocabulary.
        validate_at_start: Whether the untrained model is validated too, to compare with.
        z_loss: Factor on the squared logarithm of the softmax's sum (Chowdhery et al., "PaLM", 2022, section 5); 1e-4 there.
        neftune_noise_alpha: Of the noise on embeddings in training (Jain et al., "NEFTune", 2023); None for none.
        average: Decay of a moving average of the parameters, which is validated and exported then; None for none.
        step_in_backward: Whether parameters are stepped within backward, so that gradients are never all there.
        bad_steps: Losses in a row that are not finite and end the run, with the batch saved.

    Raises:
        ValueError: a number that makes no sense.
    """

    steps: int | None = None
    epochs: int | None = None
    global_batch_size: int = 8
    max_grad_norm: float | None = 1.0
    seed: int = 42
    validate_every: int | None = None
    validate_at_start: bool = True
    autocast: Literal["bfloat16"] | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    neftune_noise_alpha: float | None = None
    average: float | None = None
    step_in_backward: bool = False
    bad_steps: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "global_batch_size", "validate_every", "bad_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm}; expected a norm above 0, or null to leave gradients."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; expected a share from 0 to below 1.")
        if self.z_loss < 0 or (self.neftune_noise_alpha is not None and self.neftune_noise_alpha <= 0):
            raise ValueError(
                f"z_loss is {self.z_loss} and neftune_noise_alpha {self.neftune_noise_alpha}; expected 0 or more, and above 0."
            )
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average is {self.average}; expected a decay between 0 and 1, such as 0.999.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointing:
    """When a run is saved, and what it leaves.

    Attributes:
        every: Steps between two checkpoints; None: at the end, and where a signal or Ctrl-C stops the run.
        keep_last: How many of the last ones stay; None for all.
        keep_best: How many of the best by validation loss stay beside these.
        asynchronous: Whether a thread writes while training goes on.
        resume: "auto" goes on from the last checkpoint in the run's folder, if it is of this recipe; "must" is an error without
            one; "never" is an error with one: it is not overwritten.
        export: Whether the trained model (with LoRA: the adapter) is written at the end for transformers or PEFT.
        signals: What asks the run to save and end.
    """

    every: int | None = None
    keep_last: int | None = 2
    keep_best: int = 0
    asynchronous: bool = True
    resume: Literal["auto", "must", "never"] = "auto"
    export: bool = True
    signals: tuple[str, ...] = ("SIGTERM", "SIGINT")

    def __post_init__(self) -> None:
        if (self.every is not None and self.every < 1) or (self.keep_last is not None and self.keep_last < 1):
            raise ValueError(f"every is {self.every} and keep_last {self.keep_last}; expected at least 1, or null.")
        if self.keep_best < 0:
            raise ValueError(f"keep_best is {self.keep_best}; expected 0 or more.")
