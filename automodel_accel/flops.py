"""Floating-point operations that a training step asks for, by a model's modules, and what devices can do: the parts of MFU.

A GEMM of [M, K] and [K, N] counts 2 M K N. Counted are the model's own: the output of every linear, the gradient of its weight
where that trains, and of its input where anything before it trains; of the experts the ones that a token is sent to; and
attention between a token and those that it sees. Nothing that is computed twice (recompute) or spared (a loss without logits).

Not counted, so that MFU is rather too low: what is not a matrix product, the scan of a recurrent layer, and the parts that see
other inputs than tokens (towers for images and sound).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# dense bf16 rates by the vendors' data sheets, in FLOP/s; the first name found in the device's name counts
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H200", 989.4e12),
    ("GH200", 989.4e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("MI300X", 1307e12),
)
# fields of a config, as transformers' models call them
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WINDOWS: Mapping[str, str | None] = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


@dataclass(frozen=True, slots=True)
class TrainingFlops:
    """Forward and backward of one training step.

    Attributes:
        per_token: Of linears, experts and head.
        per_pair: Window of a layer's attention (None: the whole document) -> per pair of a token and one that it sees.
    """

    per_token: float
    per_pair: Mapping[int | None, float]

    def total(self, tokens: float, pairs: Mapping[int | None, float]) -> float:
        """Of so many tokens, and pairs by window."""
        return self.per_token * tokens + sum(cost * pairs[window] for window, cost in self.per_pair.items())


def training_flops(model: nn.Module) -> TrainingFlops | None:
    """What a training step of `model` costs, from its modules and its config; on any device, meta included.

    None where it cannot be said per token: an encoder-decoder, or experts of which the config does not say how many serve a token.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    experts, active = _field(text, EXPERTS), _field(text, EXPERTS_OF_A_TOKEN)
    if experts is not None and experts > 1 and active is None:
        return None
    share = 1.0 if experts is None or active is None else min(1.0, active / experts)
    own_types = {getattr(config, "model_type", None), getattr(text, "model_type", None)}
    products, trains = 0.0, False
    for module, is_expert in _modules(model, own_types):
        parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
        is_trained = any(parameter.requires_grad for parameter in parameters)
        weights = sum(_weights(module, parameter, experts, share) for parameter in parameters)
        products += 2 * weights * (share if is_expert else 1.0) * (1 + trains + is_trained)
        trains = trains or is_trained
    return TrainingFlops(products, dict(_attention(text)))


def vendor_peak(device_name: str, dtype: str) -> float | None:
    """FLOP/s of the device in 16 bits by its data sheet; None where it is not listed, or for another dtype."""
    if dtype not in ("bfloat16", "float16"):
        return None
    return next((peak for name, peak in PEAKS if name in device_name), None)


def attended_pairs(batch: Mapping[str, Any], window: int | None = None) -> torch.Tensor | int:
    """Pairs of a token and one that it sees, itself included, in a batch for causal attention; no synchronisation.

    Documents of a packed row are told apart by `position_ids`, padding by `attention_mask`, both [rows, width].
    """
    mask, positions = _matrix(batch.get("attention_mask")), _matrix(batch.get("position_ids"))
    if positions is not None:
        seen = (positions + 1).clamp(max=window) if window else positions + 1
        return (seen if mask is None or mask.shape != seen.shape else seen * mask).sum()
    if mask is not None:
        lengths = mask.sum(1)
        pairs = lengths * (lengths + 1) // 2
        if window:
            beyond = (lengths - window).clamp(min=0)
            pairs = pairs - beyond * (beyond + 1) // 2
        return pairs.sum()
    rows, width = rows_and_width(batch)
    out = max(0, width - window) if window else 0
    return rows * (width * (width + 1) // 2 - out * (out + 1) // 2)


def rows_and_width(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Shape of a batch of tokens; (0, 0) where it has none."""
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        tensor = batch.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2:
            return tensor.shape[0], tensor.shape[1]
    return 0, 0


def _matrix(tensor: object) -> torch.Tensor | None:
    return tensor if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 else None


def _field(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((number for number in found if isinstance(number, int)), None)


def _modules(model: nn.Module, own_types: set[str | None]) -> Iterator[tuple[nn.Module, bool]]:
    """The modules that tokens pass, in order, and whether each belongs to one expert of a list."""
    waiting = [(model, False)]
    while waiting:
        module, is_expert = waiting.pop()
        yield module, is_expert
        children = [
            (child, is_expert or (name == "experts" and isinstance(child, nn.ModuleList)))
            for name, child in module.named_children()
            if _sees_tokens(child, own_types) and not _is_idle(module, name)
        ]
        adapters = getattr(module, "active_adapters", None) if hasattr(module, "adapter_layer_names") else None
        if adapters is not None:
            children = [(_chosen(child, adapters), is_expert) for child, is_expert in children]
        waiting += reversed(children)


def _sees_tokens(module: nn.Module, own_types: set[str | None]) -> bool:
    """A model within the model, such as a vision tower, has a config of another type."""
    config = getattr(module, "config", None) if hasattr(type(module), "base_model_prefix") else None
    return config is None or getattr(config, "model_type", None) in own_types


def _is_idle(module: nn.Module, child: str) -> bool:
    """PEFT's wrapper for `modules_to_save` keeps the original beside the copy that trains."""
    return child == "original_module" and "modules_to_save" in module._modules


def _chosen(child: nn.Module, adapters: list[str]) -> nn.Module:
    if not isinstance(child, nn.ModuleDict):
        return child
    return nn.ModuleDict({name: adapter for name, adapter in child.items() if name in adapters})


def _weights(module: nn.Module, parameter: nn.Parameter, experts: int | None, share: float) -> float:
    """Multiply-adds per token with a parameter."""
    read, written = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if parameter is module._parameters.get("weight") and isinstance(read, int) and isinstance(written, int):
        return float(read * written)  # a quantised weight, or a part of one, has another shape
    if isinstance(module, nn.Embedding | nn.Linear) or parameter.dim() < 2:
        return 0.0
    if parameter.dim() == 3 and parameter.shape[0] == experts:
        return parameter.numel() * share
    stacked = any(other is not None and other.dim() == 3 for other in module._parameters.values())
    return 0.0 if stacked and parameter.dim() == 2 else float(parameter.numel())  # beside stacked weights: their biases


def _attention(config: Any) -> Iterator[tuple[int | None, float]]:
    """(window, FLOPs per pair) of the layers that attend, those of one window added up."""
    number = getattr(config, "num_hidden_layers", 0)
    layers = list(getattr(config, "per_layer_config", None) or [config] * number)
    default = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [default] * len(layers)
    costs: dict[int | None, float] = {}
    for layer, kind in zip(layers, kinds, strict=False):
        if kind in WINDOWS:
            field = WINDOWS[kind]
            window = getattr(layer, field, None) if field else None
            # q k and p v, and the gradients of q, k, p and v
            costs[window] = costs.get(window, 0.0) + 3 * 2.0 * _width(layer)
    yield from ((window, cost) for window, cost in costs.items() if cost)


def _width(layer: Any) -> int:
    """Elements of a query and of a value, of all heads."""
    heads = getattr(layer, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads:
        return 0
    size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    query = getattr(layer, "qk_nope_head_dim", None)
    if query is None:
        return int(2 * heads * size)
    return int(heads * (query + layer.qk_rope_head_dim + layer.v_head_dim))
