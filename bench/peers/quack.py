"""quack-kernels, in CuTe, for Hopper and later. Read in 0.6.5."""

from collections.abc import Mapping

import torch
from quack.cross_entropy import cross_entropy
from quack.linear_cross_entropy import chunked_linear_cross_entropy
from quack.rmsnorm import rmsnorm
from quack.rotary import apply_rotary_emb

from bench.case import Forward, Inputs, UnsupportedError


def forwards(variant: str) -> Mapping[str, Forward]:
    """The operations that quack has on their own; its gated activations are parts of matrix products."""
    return {
        "rms_norm": _rms_norm,
        "add_rms_norm": _add_rms_norm,
        "rope": _rope,
        "linear_cross_entropy": _linear_cross_entropy,
        "cross_entropy": _cross_entropy,
    }


def _rms_norm(inputs: Inputs) -> torch.Tensor:
    y: torch.Tensor = rmsnorm(inputs["x"], inputs["weight"], eps=inputs["eps"], weight_offset=inputs["offset"])
    return y


def _add_rms_norm(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    y, h = rmsnorm(
        inputs["x"],
        inputs["weight"],
        residual=inputs["residual"],
        eps=inputs["eps"],
        prenorm=True,
        weight_offset=inputs["offset"],
    )
    return y, h


def _rope(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    if "pairs" not in inputs:  # one angle a pair, [tokens, head_dim / 2]; made once, as a model would
        width = inputs["cos"].shape[-1] // 2
        inputs["pairs"] = tuple(inputs[name][0, :, :width].contiguous() for name in ("cos", "sin"))
    q, k = (apply_rotary_emb(inputs[name], *inputs["pairs"]) for name in ("q", "k"))
    return q.transpose(1, 2), k.transpose(1, 2)


def _without_softcap(inputs: Inputs) -> None:
    if inputs["softcap"] is not None:
        raise UnsupportedError("has no soft-cap")


def _linear_cross_entropy(inputs: Inputs) -> torch.Tensor:
    _without_softcap(inputs)
    loss: torch.Tensor = chunked_linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["target"])
    return loss


def _cross_entropy(inputs: Inputs) -> torch.Tensor:
    _without_softcap(inputs)
    loss: torch.Tensor = cross_entropy(inputs["logits"], inputs["target"])
    return loss
