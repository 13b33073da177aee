"""What a training run is asked for, and what it measured; both travel between processes as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

METHODS = ("full", "lora")
LAYOUTS = ("packed", "padded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run, the same for all variants.

    Attributes:
        model: A name in `shapes.SHAPES`.
        method: "full" (all weights train) or "lora" (an adapter on every linear but the head).
        layout: "packed" (rows of `length` tokens, filled with documents) or "padded" (a document a row).
        rows: Rows of a step.
        length: Tokens of a row at most.
        steps: Steps of the loss curve.
        warmup: Leading steps that are not timed.
        dtype: Of weights, gradients and optimizer states, such as "bfloat16".
        learning_rate: Of AdamW.
        rank: Of the adapter.
        layers: Layers of the model instead of its own number.
        seed: Of weights, and of the order of the documents.
    """

    model: str
    method: str
    layout: str
    rows: int
    length: int
    steps: int
    warmup: int
    dtype: str
    learning_rate: float
    rank: int
    layers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.layout not in LAYOUTS:
            raise ValueError(f"{self.method} on {self.layout} rows: expected one of {METHODS} on one of {LAYOUTS}.")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"{self.steps} steps of which {self.warmup} are warm-up leave none to time; give more --steps."
            )

    @property
    def title(self) -> str:
        """For people."""
        layers = f" ({self.layers} layers)" if self.layers else ""
        return f"{self.model}{layers}, {self.method}, {self.layout} rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one process measured.

    Attributes:
        losses: Of every step.
        seconds: Of every timed step; on a GPU, between events on its stream.
        cpu_seconds: Processor time of the timed steps together, all threads.
        peak_memory_bytes: The most that torch's allocator (the process, on a CPU) held while training.
        memory_before_bytes: The same before the first step.
        parameters: Of the model, adapter included.
        trainable: Those that train.
        versions: Of the packages that took part.
        report: What was swapped, of our variants.
    """

    losses: list[float]
    seconds: list[float]
    cpu_seconds: float
    peak_memory_bytes: int
    memory_before_bytes: int
    parameters: int
    trainable: int
    versions: dict[str, str]
    report: dict[str, Any] | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)
