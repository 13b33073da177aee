"""`attention` by FlashAttention-3, for Hopper. The backward of its kernels repeats bit by bit where torch is asked for that."""

from functools import partial

import torch
from flash_attn_interface import _flash_attn_backward, _flash_attn_forward

from automodel_accel.kernels.attention import flash
from automodel_accel.kernels.attention.flash import Gradients, Options, Outputs


def _common(options: Options) -> dict[str, torch.Tensor | float | int | None]:
    before, after = options.reach
    bounds, longest = (
        (None, None) if options.sequences is None else (options.sequences.bounds, options.sequences.longest)
    )
    return {
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "softmax_scale": options.scale,
        "window_size_left": before,
        "window_size_right": after,
        "softcap": options.softcap or 0.0,
    }


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> Outputs:
    output, lse, *_ = _flash_attn_forward(query, key, value, causal=options.causal, **_common(options))
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
    grad_query, grad_key, grad_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    _flash_attn_backward(
        grad_output,
        query,
        key,
        value,
        output,
        lse,
        dq=grad_query,
        dk=grad_key,
        dv=grad_value,
        is_causal=options.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_common(options),
    )
    return grad_query, grad_key, grad_value, None


KERNEL = flash.Kernel(_forward, _backward, widths=frozenset({(192, 128)}))
forward = partial(flash.forward, KERNEL)
backward = partial(flash.backward, KERNEL)
