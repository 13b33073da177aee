"""What is compared: a model of the same shape, weights and adapter, each made fast in its own way.

A variant that also changes a library (Unsloth patches transformers) does so in the process that measures it alone.
"""

import importlib
import importlib.util
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from automodel_accel.kernels.facts import Facts
from bench.e2e.job import Job
from bench.e2e.shapes import shape_of

STD = 0.02
OURS = "ours"
VANILLA = "vanilla"
# the share of weights to move by one unit in the last place so that all together err by what one rounding errs: rms ulp / sqrt(12)
ROUNDED = 1 / 12


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train.

    Attributes:
        about: In one line.
        build: (job, device, settings) -> the model, ready for its first step but for its weights.
        packages: Modules that it takes beyond this project's own.
        needs_gpu: Whether it runs on GPUs alone.
        methods: Of `job.METHODS`: those that it can do.
    """

    about: str
    build: Callable[[Job, str, Mapping[str, Any]], Any]
    packages: tuple[str, ...] = ()
    needs_gpu: bool = False
    methods: tuple[str, ...] = ("full", "lora")

    def why_not(self, job: Job, facts: Facts) -> str | None:
        """Why it cannot run here, as a sentence; None where it can."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed."
        if self.needs_gpu and facts.device == "cpu":
            return "its kernels need a GPU."
        return None if job.method in self.methods else f"it has no path for {job.method}."


def parse(name: str) -> tuple[Variant, dict[str, Any]]:
    """A variant and the settings after its name: "ours:recompute=selective:norm=false".

    Raises:
        ValueError: no such variant, or settings for one that takes none.
    """
    kind, *pairs = name.split(":")
    if kind not in VARIANTS:
        raise ValueError(f"no variant named {kind!r}; there are {', '.join(VARIANTS)}.")
    if pairs and kind != OURS:
        raise ValueError(f"{name!r}: only {OURS!r} takes settings.")
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"{name!r}: expected setting=value, got {wrong[0]!r}.")
    words = {"true": True, "false": False, "none": None}
    return VARIANTS[kind], {
        key: words.get(value.lower(), value) for key, value in (pair.split("=", 1) for pair in pairs)
    }


def fill(model: torch.nn.Module, seed: int) -> None:
    """Weights that depend on the seed and a parameter's name alone, so that every variant starts from the same ones.

    Vectors (norms) are noise around 1, matrices around 0; the second matrix of an adapter keeps its zeros.
    """
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            continue
        generator = torch.Generator(parameter.device).manual_seed(seed + zlib.crc32(name.encode()))
        mean, std = (1.0, 0.1) if parameter.dim() == 1 else (0.0, STD)
        with torch.no_grad():
            parameter.normal_(mean, std, generator=generator)


def move_by_a_rounding(model: torch.nn.Module, seed: int) -> None:
    """Move one weight in twelve by one unit in the last place: as much as rounding all of them once more."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(seed + zlib.crc32(name.encode()))
        bits = parameter.detach().view(torch.int16 if parameter.dtype.itemsize == 2 else torch.int32)
        draw = torch.rand(parameter.shape, generator=generator, device=parameter.device)
        up, down = draw < ROUNDED / 2, draw > 1 - ROUNDED / 2
        bits.add_((up.to(bits.dtype) - down.to(bits.dtype)) * (parameter.detach() != 0).to(bits.dtype))


def _base(job: Job, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    config = shape_of(job.model, job.layers).config()
    with torch.device(device):
        return auto.from_config(config, dtype=getattr(torch, job.dtype), attn_implementation="sdpa")


def _adapted(model: Any, job: Job) -> Any:
    """With PEFT's adapter where the job asks for one, in the dtype of the model."""
    if job.method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def _vanilla(job: Job, device: str, settings: Mapping[str, Any]) -> Any:
    return _adapted(_base(job, device), job)


def _compiled(job: Job, device: str, settings: Mapping[str, Any]) -> Any:
    model = _vanilla(job, device, settings)
    model.compile()
    return model


def _liger(job: Job, device: str, settings: Mapping[str, Any]) -> Any:
    liger = importlib.import_module("liger_kernel.transformers")
    model = _base(job, device)
    liger._apply_liger_kernel_to_instance(model=model)
    return _adapted(model, job)


def _unsloth(job: Job, device: str, settings: Mapping[str, Any]) -> Any:
    loader = importlib.import_module("unsloth").FastLanguageModel
    with tempfile.TemporaryDirectory() as folder:  # it takes a folder, no config
        _base(job, device).save_pretrained(folder)
        importlib.import_module("bench.tokenizer").save(folder)
        torch.cuda.empty_cache()
        dtype = getattr(torch, job.dtype)
        options = {"max_seq_length": job.length, "dtype": dtype, "load_in_4bit": False}
        model, _ = loader.from_pretrained(folder, **options)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return loader.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=2 * job.rank,
        lora_dropout=0,
        target_modules=projections,
        use_gradient_checkpointing=False,
    )


def _nemo(job: Job, device: str, settings: Mapping[str, Any]) -> Any:
    auto = importlib.import_module("nemo_automodel").NeMoAutoModelForCausalLM
    config = shape_of(job.model, job.layers).config()
    model = auto.from_config(
        config, dtype=getattr(torch, job.dtype), attn_implementation="sdpa", use_liger_kernel=True, force_hf=True
    )
    return _adapted(model.to(device), job)


def _ours(job: Job, device: str, settings: Mapping[str, Any]) -> Any:
    import automodel_accel

    return automodel_accel.apply(_vanilla(job, device, settings), **settings)


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        VANILLA: Variant("transformers (and PEFT) as they are, sdpa attention", _vanilla),
        "compile": Variant("the same under torch.compile", _compiled),
        "liger": Variant("Liger-Kernel on the model (and PEFT)", _liger, ("liger_kernel",), needs_gpu=True),
        "unsloth": Variant("Unsloth's own model", _unsloth, ("unsloth",), needs_gpu=True, methods=("lora",)),
        "nemo": Variant("NeMo Automodel's own model (and PEFT)", _nemo, ("nemo_automodel",), needs_gpu=True),
        OURS: Variant("automodel_accel.apply", _ours),
    }
)
