"""A decoder layer of Llama and the norm after it, as transformers and PEFT build them, around the tensors of a case."""

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModel, LlamaConfig
from transformers.initialization import no_init_weights

from bench.case import Inputs

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
FEW_WORDS = 8


def config(inputs: Inputs) -> Any:
    """Of a model of one layer with the sizes of the tensors."""
    made: Any = LlamaConfig
    width, shapes = inputs["head_dim"], {name: inputs[f"{name}_weight"].shape for name in LINEARS}
    return made(
        hidden_size=shapes["q_proj"][1],
        intermediate_size=shapes["gate_proj"][0],
        num_hidden_layers=1,
        num_attention_heads=shapes["q_proj"][0] // width,
        num_key_value_heads=shapes["k_proj"][0] // width,
        head_dim=width,
        vocab_size=FEW_WORDS,
        rms_norm_eps=inputs["eps"],
        max_position_embeddings=max(inputs["x"].shape[1], 2048),
        attn_implementation="sdpa",
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def build(inputs: Inputs, patch: Callable[[nn.Module], object] = lambda model: None) -> nn.Module:
    """The model, with PEFT's adapters where the case has any.

    Args:
        inputs: Of a case.
        patch: What is done to the model before the adapters are added.
    """
    x: torch.Tensor = inputs["x"]
    with torch.device(x.device), no_init_weights():
        auto: Any = AutoModel
        model = auto.from_config(config(inputs), dtype=x.dtype)
    patch(model)
    if "q_proj_a" in inputs:
        add_adapters(model, inputs, LINEARS)
    place(model, inputs)
    return model.train()  # type: ignore[no-any-return]


def add_adapters(model: nn.Module, inputs: Inputs, names: tuple[str, ...]) -> None:
    """PEFT's, without weights."""
    rank = inputs[f"{names[0]}_a"].shape[0]
    lora = peft.LoraConfig(r=rank, lora_alpha=round(inputs["scale"] * rank), target_modules=list(names))
    peft.inject_adapter_in_model(lora, model, low_cpu_mem_usage=True)


def place(model: nn.Module, inputs: Inputs) -> None:
    """Make the case's tensors the model's weights; those of other modules do not train."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for path, module in modules:
        name = path.rpartition(".")[2]
        if f"{name}_weight" in inputs:
            getattr(module, "base_layer", module).weight = inputs[f"{name}_weight"]
        if f"{name}_a" in inputs:
            (adapter,) = module.lora_A
            module.lora_A[adapter].weight = inputs[f"{name}_a"]
            module.lora_B[adapter].weight = inputs[f"{name}_b"]


class Built:
    """A forward through modules that are built around a case's tensors, once."""

    def __init__(self, make: Callable[[Inputs], nn.Module], call: Callable[[Any, torch.Tensor], Any]) -> None:
        self._make, self._call = make, call
        self._made: tuple[torch.Tensor, nn.Module] | None = None

    def __call__(self, inputs: Inputs) -> Any:
        x: torch.Tensor = inputs["x"]
        if self._made is None or self._made[0] is not x:
            self._made = x, self._make(inputs)
        return self._call(self._made[1], x)


def last_hidden_state(model: Any, x: torch.Tensor) -> torch.Tensor:
    """What the model makes of embeddings."""
    found: torch.Tensor = model(inputs_embeds=x).last_hidden_state
    return found
