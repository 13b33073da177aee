"""`attention` by flash-attn 2: NVIDIA GPUs since Ampere. The backward of its kernels repeats bit by bit where torch is asked for that."""

from functools import partial

import torch
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)

from automodel_accel.kernels.attention import flash
from automodel_accel.kernels.attention.flash import Gradients, Options, Outputs, Sequences


def _bounds(sequences: Sequences) -> dict[str, torch.Tensor | int]:
    return {
        "cu_seqlens_q": sequences.bounds,
        "cu_seqlens_k": sequences.bounds,
        "max_seqlen_q": sequences.longest,
        "max_seqlen_k": sequences.longest,
    }


def _scores(options: Options) -> dict[str, float | int | bool | None]:
    before, after = options.reach
    return {
        "dropout_p": 0.0,
        "softmax_scale": options.scale,
        "causal": options.causal,
        "window_size_left": before,
        "window_size_right": after,
        "softcap": options.softcap or 0.0,
        "alibi_slopes": None,
    }


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> Outputs:
    scores = _scores(options)
    if options.sequences is None:
        output, lse, *_ = _flash_attn_forward(query, key, value, **scores, return_softmax=False)
    else:
        output, lse, *_ = _flash_attn_varlen_forward(query, key, value, **_bounds(options.sequences), **scores)
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
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    given = (grad_output, query, key, value, output, lse, *grads)
    scores = {**_scores(options), "deterministic": torch.are_deterministic_algorithms_enabled()}
    if options.sequences is None:
        _flash_attn_backward(*given, **scores)
    else:
        _flash_attn_varlen_backward(*given, **_bounds(options.sequences), **scores)
    return grads[0], grads[1], grads[2], None


KERNEL = flash.Kernel(_forward, _backward)
forward = partial(flash.forward, KERNEL)
backward = partial(flash.backward, KERNEL)
