"""`attention` by the flash kernels inside of torch, of which `scaled_dot_product_attention` offers neither windows nor sequences.

Their backward repeats bit by bit where torch is asked for that.
"""

from functools import partial

import torch

from automodel_accel.kernels.attention import flash
from automodel_accel.kernels.attention.flash import Gradients, Options, Outputs

aten = torch.ops.aten
Places = tuple[torch.Tensor | None, torch.Tensor | None, int, int]


def _places(query: torch.Tensor, key: torch.Tensor, options: Options) -> Places:
    """Bounds of the queries and of the keys, None where rows are of one length, and the longest of both."""
    if options.sequences is None:
        return None, None, query.shape[1], key.shape[1]
    bounds, longest = options.sequences.bounds, options.sequences.longest
    return bounds, bounds, longest, longest


def _keywords(options: Options) -> dict[str, float | int]:
    before, after = options.reach
    return {"scale": options.scale, "window_size_left": before, "window_size_right": after}


def _only_causal(options: Options) -> bool:
    return options.causal and options.window is None


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> Outputs:
    dropout_p, returns_weights = 0.0, False
    given = (query, key, value, *_places(query, key, options), dropout_p, _only_causal(options), returns_weights)
    output, lse, *_ = aten._flash_attention_forward(*given, **_keywords(options))
    return output, lse


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
) -> Gradients:
    dropout_p = 0.0
    random_state = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_empty(0)
    places = (*_places(query, key, options), dropout_p, _only_causal(options), *random_state)
    given = (grad_output, query, key, value, output, lse, *places)
    grad_query, grad_key, grad_value = aten._flash_attention_backward(*given, **_keywords(options))
    return grad_query, grad_key, grad_value, None


KERNEL = flash.Kernel(_forward, _backward)
forward = partial(flash.forward, KERNEL)
backward = partial(flash.backward, KERNEL)
