"""`attention` by FlashAttention-4, for Hopper and Blackwell. Its backward repeats bit by bit where torch is asked for that."""

from functools import partial

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

from automodel_accel.kernels.attention import flash
from automodel_accel.kernels.attention.flash import Gradients, Options, Outputs


def _common(options: Options) -> dict[str, torch.Tensor | float | int | bool | None]:
    before, after = (None if reach < 0 else reach for reach in options.reach)
    bounds, longest = (
        (None, None) if options.sequences is None else (options.sequences.bounds, options.sequences.longest)
    )
    return {
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "softmax_scale": options.scale,
        "causal": options.causal,
        "window_size_left": before,
        "window_size_right": after,
        "softcap": options.softcap or 0.0,
        "learnable_sink": options.sinks,
    }


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> Outputs:
    output, lse, *_ = _flash_attn_fwd(query, key, value, return_lse=True, **_common(options))
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
    deterministic = torch.are_deterministic_algorithms_enabled()
    given = query, key, value, output, grad_output, lse
    grad_query, grad_key, grad_value, *rest = _flash_attn_bwd(*given, deterministic=deterministic, **_common(options))
    return grad_query, grad_key, grad_value, rest[0] if options.sinks is not None else None


KERNEL = flash.Kernel(_forward, _backward)
forward = partial(flash.forward, KERNEL)
backward = partial(flash.backward, KERNEL)
