"""Launches, and saved bytes per token, of one decoder layer forward and backward: the difference of models of two layers and of one.

The launches are those of a tiny model with the Triton kernels in the interpreter; the saved bytes those of real shapes in
bfloat16 on a few tokens. All that a layer does not add (embedding, masks, head, loss) cancels out.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from typing import Any, TypeVar

import peft
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

import automodel_accel as accel
from tests.budgets.liger import runnable
from tests.budgets.watch import Watch
from tests.interpreter import repair
from tests.tiny import batch, tiny

Change = Callable[[PreTrainedModel], object]  # what is done to a model before it is counted
Counted = TypeVar("Counted")

TORCH_ATTENTION = {"attention": False}  # else the fastest one here is chosen, which need not be the same twice
TRITON: dict[str, Any] = {
    **dict.fromkeys(("norm", "mlp", "rope", "residual", "linear"), "triton"),
    **TORCH_ATTENTION,
    "loss": False,  # no part of a layer
    "strict": True,
}
FP8: dict[str, Any] = {**TRITON, "linear": "auto", "implementation": "triton"}  # and the recipe
# settings whose saved bytes have a budget
SAVING: dict[str, dict[str, Any]] = {
    "default": TORCH_ATTENTION,
    "selective": {**TORCH_ATTENTION, "recompute": "selective"},
}

LLAMA_8B: dict[str, Any] = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "head_dim": 128,
}
LLAMA_1B = LLAMA_8B | {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
QWEN_8B = LLAMA_8B | {"intermediate_size": 12288}
QWEN_600M = LLAMA_8B | {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
# name -> architecture, and the shape of its layers
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3-8B": ("llama", LLAMA_8B),
    "Llama-3.2-1B": ("llama", LLAMA_1B),
    "Qwen3-8B": ("qwen3", QWEN_8B),
    "Qwen3-0.6B": ("qwen3", QWEN_600M),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DROPOUT = 0.05
TOKENS = 16
FEW_WORDS = 64


def vanilla(model: PreTrainedModel) -> None:
    """Nothing."""


def ours(**settings: Any) -> Change:
    """`apply` with these settings."""
    return lambda model: accel.apply(model, **settings)


def lora(dropout: float, then: Change) -> Change:
    """PEFT's adapters of rank 16 on all linears, in the dtype of the model, of which nothing else trains; and `then`."""

    def change(model: PreTrainedModel) -> None:
        config = peft.LoraConfig(r=16, lora_dropout=dropout, target_modules=LINEARS)
        peft.inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
            parameter.data = parameter.data.to(model.dtype)
        then(model)

    return change


def liger(model: PreTrainedModel) -> None:
    """Liger's own patch of the architecture, for the rest of the process; without its loss, which is no part of a layer."""
    patch = getattr(import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{model.config.model_type}")
    patch(cross_entropy=False, fused_linear_cross_entropy=False, model=model)


def launches(change: Change, architecture: str = "llama") -> dict[str, Counter[str]]:
    """Names of the kernels that a layer launches, forward and backward."""
    model = tiny(architecture, torch.bfloat16, num_hidden_layers=2)
    two, one = _of_two_and_one(model, change, _count_launches)
    return {direction: two[direction] - one[direction] for direction in two}


def saved_bytes(name: str, change: Change) -> float:
    """Bytes that one layer of a shape keeps for backward, per token; each memory once, parameters not counted."""
    architecture, shape = SHAPES[name]
    config = CONFIG_MAPPING[architecture](**shape, num_hidden_layers=2, vocab_size=FEW_WORDS)
    with no_init_weights():  # drawing random ones takes longer than all else
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    two, one = _of_two_and_one(model.train(), change, _count_saved)
    return (two - one) / TOKENS


def _of_two_and_one(
    model: PreTrainedModel, change: Change, count: Callable[[PreTrainedModel], Counted]
) -> tuple[Counted, Counted]:
    """What is counted of a model of two layers, and of the same model without its second layer."""
    change(model)
    two = count(model)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return two, count(model)


def _count_launches(model: PreTrainedModel) -> dict[str, Counter[str]]:
    inputs = {**batch(), "use_cache": False}
    model(**inputs).loss.backward()  # as below: once before it is counted
    model.zero_grad()
    with Watch() as forward:
        loss = model(**inputs).loss
    with Watch() as backward:
        loss.backward()
    named = (("forward", forward), ("backward", backward))
    return {direction: Counter(launch.name for launch in watch.launches) for direction, watch in named}


def _count_saved(model: PreTrainedModel) -> int:
    input_ids = torch.arange(TOKENS)[None] % FEW_WORDS
    kept: dict[int, torch.Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(x: torch.Tensor) -> torch.Tensor:
        address = x.untyped_storage().data_ptr()
        if address not in parameters:
            kept.setdefault(address, x)
        return x

    inputs = {"input_ids": input_ids, "labels": input_ids, "use_cache": False}
    model(**inputs)  # what is measured or built once, such as the choice of an attention, is not counted
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}  # columns moved some
    with saved_tensors_hooks(pack, lambda x: x):
        model(**inputs)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def main() -> None:
    """Write a row for each figure, of vanilla, of ours and of Liger, whose patch comes last: it stays in force."""
    repair()
    selective = SAVING["selective"]
    changes = {
        "vanilla": (vanilla, vanilla),
        "ours": (ours(**TRITON), ours(**SAVING["default"])),
        "ours, selective": (ours(**{**TRITON, **selective}), ours(**selective)),
        "liger": (liger, liger),
    }
    for implementation, (for_launches, for_saving) in changes.items():
        with runnable() if implementation == "liger" else nullcontext():
            found: dict[str, float] = {
                f"launches of a Llama layer, {way}": sum(count.values())
                for way, count in launches(for_launches).items()
            }
            found |= {f"saved bytes per token, {name}": saved_bytes(name, for_saving) for name in SHAPES}
        for figure, value in found.items():
            row = {"figure": figure, "implementation": implementation, "value": value}
            sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
