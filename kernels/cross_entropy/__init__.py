"""cross_entropy: the loss of logits that exist; for an output head before them, linear_cross_entropy never builds them.

    z = scale * logits      or softcap * tanh(that / softcap)           lse = log(sum over V of exp(z))
    loss = lse - (1 - s) z_target - s mean over V of z + c lse^2        with label smoothing s and z-loss c

    dz = w ((1 + 2 c lse) exp(z - lse) - s / V - (1 - s) [v = target])  w = grad_output token_weight / divisor, times
                                                                        scale (1 - tanh^2)

Saved for backward: the logits and two floats a row, where torch keeps a second [N, V] in float32. The caller's logits are never
written to. Floor: 1 pass over [N, V] forward, 2 backward; about 6 N V and 5 N V FLOPs.
Sources: Szegedy et al., "Rethinking the Inception Architecture", 2016 (smoothing); de Brebisson and Vincent, "The Z-loss", 2016,
as in Chowdhery et al., "PaLM", 2022; Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist

from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_te, in_torch, in_triton
from automodel_accel.kernels.cross_entropy import reference
from automodel_accel.kernels.launch import rows
from automodel_accel.kernels.linear_cross_entropy import check_options, check_shard, check_targets
from automodel_accel.kernels.linear_cross_entropy.chunks import compute_dtype
from automodel_accel.kernels.linear_cross_entropy.shard import VocabShard, named_group
from automodel_accel.kernels.registration import Definition, register

SCALED, CAPPED, Z_LOSS = "scaled logits", "soft-caps", "z-losses"
SHARDED, UNEVEN = "shards of the vocabulary", "uneven shards of the vocabulary"
FEATURES = frozenset({SCALED, CAPPED, Z_LOSS, SHARDED, UNEVEN})

KERNEL = Kernel(
    name="cross_entropy",
    reference=reference.cross_entropy,
    implementations=(
        in_triton("automodel_accel.kernels.cross_entropy.fused", features=FEATURES),
        in_torch("automodel_accel.kernels.cross_entropy.eager", features=FEATURES),
        in_te(
            "automodel_accel.kernels.cross_entropy.te",
            frozenset({SHARDED}),
            {},
            dtypes=frozenset({torch.float32, torch.bfloat16}),
        ),
    ),
)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    token_weight: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: float | torch.Tensor | None = None,
    shard: VocabShard | None = None,
    implementation: str = AUTO,
) -> torch.Tensor:
    """Cross entropy of logits, computed in float32 (float64 for float64).

    The loss is that of `torch.nn.functional.cross_entropy`: NaN for a mean over no target at all, with gradients of zero. What
    an ignored row holds, NaN even, goes nowhere.

    Args:
        logits: [..., V], float32, bfloat16, float16 (or float64 for "torch"). Copied where no view [N, V] of them exists.
        target: [...], int64: a class in [0, V), or `ignore_index`. Anything else is an error on a CPU. On a GPU nothing waits for
            the host: there it makes loss and gradient NaN in "triton", where TRITON_DEBUG=1 turns it into a device-side
            assertion, and trips torch's own in "torch".
        token_weight: [...], a factor on the loss of each token, of any floating dtype and without a gradient; None for 1.
        scale: Factor on the logits, before the soft-cap.
        softcap: Logits become softcap * tanh(logits / softcap); None for none.
        ignore_index: Target of tokens that do not count; their row of the gradient is zero.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1].
        z_loss: Factor of lse^2, which is added to the loss of each token.
        reduction: "mean" over the targets that count (weighted: over the sum of their weights), "sum", or "none".
        num_items: Divides the sum in place of that number: a number, or a 0-d tensor that is not read by the host. Only
            with "mean".
        shard: Which classes of the vocabulary these logits are of, where they are cut over the ranks of a process group; `target` stays a
            class of the whole. All ranks make the same call, the loss is the same on all, and the gradient is that of this rank's
            logits. One all-gather of 20 bytes a token. None for the whole vocabulary.
        implementation: "auto", "triton", "torch" or "te" (Transformer Engine's parallel cross entropy, for equal shards).

    Returns:
        0-d, or [...] for "none", in float32 (float64 for float64). Differentiable once, in logits.

    Raises:
        ValueError: shapes, dtypes or options do not fit, a target is out of range (CPU), or the implementation cannot serve the call.
    """
    _check_tensors(logits, target, token_weight)
    check_options("cross_entropy", softcap, label_smoothing, z_loss, reduction, num_items)
    check_shard("cross_entropy", "logits", logits.shape, logits.shape[-1], shard)
    if num_items is not None and not isinstance(num_items, torch.Tensor):
        num_items = logits.new_full((), num_items, dtype=compute_dtype(logits), requires_grad=False)
    form = (scale, softcap, ignore_index, label_smoothing, z_loss)
    cut = ("", 0, 0) if shard is None else (shard.group.group_name, shard.start, shard.vocab)
    return _call(logits, target, token_weight, num_items, *form, reduction, implementation, *cut)[0]


def _check_tensors(logits: torch.Tensor, target: torch.Tensor, token_weight: torch.Tensor | None) -> None:
    shape = logits.shape[:-1]
    if logits.dim() < 2:
        raise ValueError(f"cross_entropy: logits are {tuple(logits.shape)}, expected [..., V] with V classes.")
    if target.shape != shape or target.dtype != torch.int64 or target.device != logits.device:
        raise ValueError(
            f"cross_entropy: target is {tuple(target.shape)} {target.dtype} on {target.device}, expected "
            f"{tuple(shape)} torch.int64 on {logits.device} for logits {tuple(logits.shape)}."
        )
    if token_weight is None:
        return
    fits = token_weight.shape == shape and token_weight.is_floating_point() and token_weight.device == logits.device
    if not fits or token_weight.requires_grad:
        raise ValueError(
            f"cross_entropy: token_weight is {tuple(token_weight.shape)} {token_weight.dtype} on {token_weight.device}"
            f"{', and wants a gradient' if token_weight.requires_grad else ''}, expected {tuple(shape)} of a floating "
            f"dtype on {logits.device} without one."
        )


@functools.cache
def features(
    scale: float, softcap: float | None, z_loss: float, sharded: bool = False, even: bool = True
) -> frozenset[str]:
    """What a call asks for beyond the loss of plain logits, ignored targets and label smoothing."""
    asked = {SCALED: scale != 1.0, CAPPED: softcap is not None, Z_LOSS: z_loss != 0.0}
    asked |= {SHARDED: sharded, UNEVEN: sharded and not even}
    return frozenset(name for name, wanted in asked.items() if wanted)


def _module(
    logits: torch.Tensor,
    scale: float,
    softcap: float | None,
    z_loss: float,
    implementation: str,
    group: str,
    start: int,
    vocab: int,
) -> Any:
    device, dtype, columns = logits.device.type, logits.dtype, logits.shape[-1]
    if not group:
        return implementation_module(KERNEL, device, dtype, columns, implementation, features(scale, softcap, z_loss))
    ranks = named_group(group)
    size = dist.get_world_size(ranks)
    asked = features(scale, softcap, z_loss, True, columns * size == vocab and start == columns * dist.get_rank(ranks))
    module = implementation_module(KERNEL, device, dtype, -(-vocab // size), implementation, asked)
    return module.sharded(ranks, start, vocab)


def _row_weights(
    target_N: torch.Tensor,
    token_weight: torch.Tensor | None,
    num_items: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(weight of each row, 0 where it is ignored, or None for 1; what divides their sum), nothing read by the host."""
    counts_N = target_N != ignore_index
    weight_N = None if token_weight is None else torch.where(counts_N, token_weight.reshape(-1).to(dtype), 0.0)
    if reduction != "mean":
        return weight_N, torch.ones((), dtype=dtype, device=target_N.device)
    if num_items is not None:
        return weight_N, num_items.to(target_N.device, dtype, non_blocking=True)
    return weight_N, counts_N.sum().to(dtype) if weight_N is None else weight_N.sum()


def _forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    token_weight: torch.Tensor | None,
    num_items: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    implementation: str,
    group: str = "",
    start: int = 0,
    vocab: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    if target.device.type == "cpu":
        check_targets("cross_entropy", target, vocab if group else logits.shape[-1], ignore_index)
    target_N, module = target.reshape(-1), _module(logits, scale, softcap, z_loss, implementation, group, start, vocab)
    loss_N, stats = module.forward(rows(logits), target_N, scale, softcap, ignore_index, label_smoothing, z_loss)
    dtype = compute_dtype(logits)
    weight_N, divisor = _row_weights(target_N, token_weight, num_items, ignore_index, reduction, dtype)
    if weight_N is not None:
        loss_N = torch.where(target_N == ignore_index, 0.0, loss_N * weight_N)
    return loss_N.view(target.shape) if reduction == "none" else loss_N.sum() / divisor, stats


def _fake_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    token_weight: torch.Tensor | None,
    num_items: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    implementation: str,
    group: str = "",
    start: int = 0,
    vocab: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(logits)
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    return loss, logits.new_empty((2, target.numel()), dtype=dtype)


def _backward(
    grad_output: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    token_weight: torch.Tensor | None,
    num_items: torch.Tensor | None,
    stats: torch.Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    implementation: str,
    group: str = "",
    start: int = 0,
    vocab: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With an empty tensor beside it: a registered operation mistakes a tuple of one for a tensor."""
    target_N, dtype = target.reshape(-1), compute_dtype(logits)
    weight_N, divisor = _row_weights(target_N, token_weight, num_items, ignore_index, reduction, dtype)
    weight = (grad_output.reshape(-1) if reduction == "none" else grad_output) / divisor
    weight_N = weight.expand(target_N.shape) if weight_N is None else weight * weight_N
    form = (scale, softcap, ignore_index, label_smoothing, z_loss)
    module = _module(logits, scale, softcap, z_loss, implementation, group, start, vocab)
    grad_NV = module.backward(rows(logits), target_N, weight_N, stats, *form)
    return grad_NV.view(logits.shape), logits.new_empty(0)


def _fake_backward(
    grad_output: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    token_weight: torch.Tensor | None,
    num_items: torch.Tensor | None,
    stats: torch.Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    implementation: str,
    group: str = "",
    start: int = 0,
    vocab: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.options = inputs[4:]
    ctx.save_for_backward(*inputs[:4], output[1])


def _gradients(ctx: Any, grad_output: torch.Tensor, backward: Any) -> tuple[Any, ...]:
    return backward(grad_output, *ctx.saved_tensors, *ctx.options)[0], *(None,) * (3 + len(ctx.options))


_call = register(
    "cross_entropy",
    Definition(
        forward=_forward,
        backward=_backward,
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        gradients=_gradients,
    ),
)
