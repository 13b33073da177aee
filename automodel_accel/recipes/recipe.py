"""Recipe: all that one run is, filled from a YAML file.

    recipe = load(Path("recipe.yaml"), ["--optimizer.lr=1e-4"])
    print(to_yaml(recipe))

Sections have the names of what they fill: a key that there is not, a value of another type and a number that makes no sense are
errors with the file, the line and the nearest name. Nothing that a recipe names is imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from automodel_accel.config import AccelConfig
from automodel_accel.data.settings import (
    Batching,
    BinData,
    ChatData,
    HellaSwagData,
    InstructionData,
    MockData,
    SquadData,
    TextData,
)
from automodel_accel.data.vision_settings import Captions, CordV2, ImageChat, Llava, MedPix, MockImages, Rdr
from automodel_accel.freezing import Freezing
from automodel_accel.kernels.facts import environment as of_process
from automodel_accel.parallel.mesh import Mesh
from automodel_accel.recipes import nemo
from automodel_accel.recipes.filling import fill
from automodel_accel.recipes.reading import overridden, read, text_of
from automodel_accel.train.logs import Logging
from automodel_accel.train.optimizers import Optimizer
from automodel_accel.train.schedules import Schedule
from automodel_accel.train.settings import Checkpointing, Training

TextSource = ChatData | InstructionData | SquadData | HellaSwagData | TextData | BinData | MockData
VisionSource = CordV2 | Rdr | MedPix | Llava | ImageChat | Captions | MockImages
VISION_KINDS = (CordV2, Rdr, MedPix, Llava, ImageChat, Captions, MockImages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model of transformers.

    Attributes:
        path: A folder, a hub id, or demo:NAME of the models that need no download.
        task: "causal_lm", "image_text_to_text", or "auto": the latter where the data has images.
        weights: "pretrained"; "random" builds it from its config alone.
        config: Settings of its config to change, such as {num_hidden_layers: 2}; with random weights alone.
        dtype: Of its parameters; "auto": bfloat16 on a GPU, float32 on a CPU.
        quantize: "nf4" (4 bits, for QLoRA) or "int8", by bitsandbytes; None: as the checkpoint is.
        attn_implementation: As in from_pretrained: "sdpa", "flash_attention_2"; None: transformers' choice.
        tokenizer: Folder or hub id of another tokenizer (or processor).
        processor: Settings of the processor, such as {max_pixels: 1003520}.
        revision: Of the hub.
        trust_remote_code: Whether code that the model brings is run.
        freeze: Parts of the model that keep their values.
    """

    path: str
    task: Literal["auto", "causal_lm", "image_text_to_text"] = "auto"
    weights: Literal["pretrained", "random"] = "pretrained"
    config: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantize: Literal["nf4", "int8"] | None = None
    attn_implementation: str | None = None
    tokenizer: str | None = None
    processor: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    trust_remote_code: bool = False
    freeze: Freezing = field(default_factory=Freezing)

    def __post_init__(self) -> None:
        if self.config and self.weights == "pretrained":
            raise ValueError("config changes the shape of a model, which its weights do not fit; set weights: random.")
        if self.quantize and self.weights == "random":
            raise ValueError("quantize rounds weights that were trained; leave it out, or set weights: pretrained.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Adapters, by PEFT's names and defaults (but for target_modules).

    Attributes:
        r: Rank.
        lora_alpha: The adapters' output is scaled by lora_alpha / r.
        lora_dropout: On their input.
        target_modules: "all-linear", names, patterns such as "*_proj", or a regular expression of whole names.
        exclude_modules: Names or patterns that are left out.
        modules_to_save: Modules that are trained as a whole beside the adapters.
        use_rslora: Scale by the root of r instead.
        use_dora: Magnitude and direction apart (Liu et al., "DoRA", 2024).
        settings: Further fields of peft.LoraConfig.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.r < 1 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"r is {self.r} and lora_dropout {self.lora_dropout}; expected at least 1, and 0 to below 1."
            )
        named = {field.name for field in fields(self)} & set(self.settings)
        if named:
            raise ValueError(f"settings holds {', '.join(sorted(named))}, which has a key of its own; write it there.")

    def config(self) -> dict[str, Any]:
        """Fields of peft.LoraConfig."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "settings"}
        lists = {name: list(value) for name, value in own.items() if isinstance(value, tuple)}
        return {name: value for name, value in {**own, **lists, **self.settings}.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """Products of 8-bit values; see docs/fp8.md.

    Attributes:
        recipe: How values are rounded; "auto" only where it pays.
        layers: Patterns of dotted names; none: all linears that it serves.
    """

    recipe: Literal["auto", "tensorwise", "rowwise", "tensorwise_e5m2", "delayed", "te"] = "auto"
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """A teacher whose probabilities the model learns beside the labels (Hinton et al., 2015).

    Attributes:
        teacher: A model with the same vocabulary.
        weight: Of the divergence; the labels' loss has one minus it.
        temperature: Divides the logits of both.
    """

    teacher: Model
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1 or not self.temperature > 0:
            raise ValueError(
                f"weight is {self.weight} and temperature {self.temperature}; expected above 0 to 1, and above 0."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Data alone, as a command line gives it.

    Attributes:
        data: As in a recipe.
    """

    data: TextSource | VisionSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run.

    Attributes:
        model: What is trained.
        data: What it learns from.
        validation: What it is held against, by names; null for nothing.
        batching: How samples become batches.
        accel: What `apply` is asked for; false trains plain transformers.
        lora: Adapters; without, the whole model is trained.
        fp8: Products of 8-bit values.
        mesh: How the processes are laid out.
        optimizer: Its kind and rates.
        schedule: How the rate moves.
        training: How long, and what a step does.
        distillation: A teacher.
        checkpoint: When the run is saved.
        logging: Where its figures go.
        output: Folder of the run; None: runs/NAME of the recipe's file.
    """

    model: Model
    data: TextSource | VisionSource
    validation: dict[str, TextSource | VisionSource] | None = None
    batching: Batching = field(default_factory=Batching)
    accel: AccelConfig | Literal[False] = field(default_factory=AccelConfig)
    lora: Lora | None = None
    fp8: Fp8 | None = None
    mesh: Mesh = field(default_factory=Mesh)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    training: Training = field(default_factory=Training)
    distillation: Distillation | None = None
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    logging: Logging = field(default_factory=Logging)
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.fp8 is not None and self.accel is False:
            raise ValueError("fp8 is a part of what accel does, and accel is false; leave one of them out.")
        if self.fp8 is not None and self.accel and self.accel.fp8 is not False:
            raise ValueError("accel.fp8 and fp8 say the same; leave accel.fp8 out.")
        if self.accel is False and self.distillation is not None:
            raise ValueError("distillation is one of accel's operations, and accel is false; leave one of them out.")
        if self.distillation is not None and self.mesh.context > 1:
            raise ValueError("mesh.context cuts rows over ranks, of which a teacher is given the whole; set it to 1.")
        has_images = isinstance(self.data, VISION_KINDS)
        others = [name for name, one in self.held_out.items() if isinstance(one, VISION_KINDS) != has_images]
        if others:
            raise ValueError(f"validation.{others[0]} and data: one has images and the other does not.")
        if self.model.quantize and self.lora is None:
            raise ValueError("model.quantize leaves nothing to train; add lora (QLoRA), or leave it out.")

    @property
    def has_images(self) -> bool:
        """Whether the data are chats with images."""
        return isinstance(self.data, VISION_KINDS)

    @property
    def held_out(self) -> dict[str, TextSource | VisionSource]:
        """The validation sets by their names."""
        return self.validation or {}

    def accel_config(self) -> AccelConfig:
        """What `apply` is asked for, fp8 included; accel is not False."""
        assert self.accel is not False
        return self.accel if self.fp8 is None else replace(self.accel, fp8=self.fp8.recipe, fp8_layers=self.fp8.layers)


def load(path: Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Recipe:
    """The recipe in a YAML file, with what it extends, under overrides of the command line.

    Args:
        path: Of the file; one of NeMo Automodel's is translated, and what changes by that is logged.
        overrides: Such as "--optimizer.lr=1e-4".
        environment: What ${env:NAME} stands for; None: this process's.

    Raises:
        RecipeError: every problem on a line of its own, with its place.
    """
    known = of_process() if environment is None else environment
    text = text_of(path)
    if nemo.is_theirs(text):
        entry = overridden(nemo.read_theirs(text, str(path), overrides), overrides, known)
    else:
        entry = read(path, overrides, known)
    recipe = fill(Recipe, entry)
    return recipe if recipe.output is not None else replace(recipe, output=Path("runs") / path.stem)
