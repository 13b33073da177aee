"""linear_cross_entropy: output head and cross entropy in one operation that never builds the logits.

    z = scale * (hidden @ weight.T + bias)      or softcap * tanh(that / softcap)           lse = log(sum over V of exp(z))
        + lora_x @ lora_b.T within the brackets for a LoRA'd head
    loss = lse - (1 - s) z_target - s mean over V of z + c lse^2                            with label smoothing s and z-loss c

    dz = w ((1 + 2 c lse) exp(z - lse) - s / V - (1 - s) [v = target])
    w = grad_output / number of targets, times scale (1 - tanh^2)
    dhidden = dz @ weight          dweight = dz.T @ hidden          dbias = sum over rows of dz
    dlora_x = dz @ lora_b          dlora_b = dz.T @ lora_x

Tokens are worked off in chunks (chunks.py): dz takes the place of a chunk's logits, and brings its share to the gradients at
once. The gradients of the mean and of the sum are thus ready when the loss is, and backward scales them. A vector of losses,
float16 (whose range is too narrow for gradients of an unknown scale) and a second backward through one graph compute them in
backward, from hidden and weight, by the same loop. Targets that are ignored are dropped before the first GEMM.

Beyond inputs and gradients it needs one chunk: no [N, V], no second [V, H]. Floor: 6 N H V FLOPs, 2 N H V of which each of a
frozen hidden and a frozen weight spares. Sources: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024;
Hsu et al., "Liger Kernel", 2024 (gradients in the forward pass); Hu et al., "LoRA", 2021; Chowdhery et al., "PaLM", 2022,
section 5 (z-loss).
"""

from typing import Any

import torch
import torch.distributed as dist

from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_torch, in_triton
from automodel_accel.kernels.linear_cross_entropy import reference
from automodel_accel.kernels.linear_cross_entropy.chunks import (
    Options,
    Tensors,
    compute_dtype,
    divisor,
    empty_gradients,
    loss_and_gradients,
)
from automodel_accel.kernels.linear_cross_entropy.shard import VocabShard
from automodel_accel.kernels.registration import Definition, register

REDUCTIONS = ("mean", "sum", "none")

KERNEL = Kernel(
    name="linear_cross_entropy",
    reference=reference.linear_cross_entropy,
    implementations=(
        in_triton("automodel_accel.kernels.linear_cross_entropy.fused"),
        in_torch("automodel_accel.kernels.linear_cross_entropy.eager"),
    ),
)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: float | torch.Tensor | None = None,
    valid_rows: int | None = None,
    workspace_bytes: int | None = None,
    shard: VocabShard | None = None,
    implementation: str = AUTO,
) -> torch.Tensor:
    """Cross entropy of the logits scale * (hidden @ weight.T + bias + lora_x @ lora_b.T), which are never built as a whole.

    Logits are rounded to the dtype of `hidden` as a linear layer, and an adapter around it, round them; all else is float32 (float64 for float64). The loss
    is that of `torch.nn.functional.cross_entropy`: NaN for a mean over no target at all, with gradients of zero.

    Args:
        hidden: [N, H], float32, bfloat16, float16 (or float64 for "torch").
        weight: [V, H] in the same dtype.
        target: [N], int64: a class in [0, V), or `ignore_index`. Anything else is an error on a CPU. On a GPU nothing waits for
            the host: there it makes the loss NaN in "triton", and trips torch's device-side assertion in "torch".
        bias: [V] in the same dtype.
        lora_x: [N, R], what an adapter brings to its last, low-rank product, its scaling included. In the dtype of `hidden`, or
            in float32 beside 16 bit: its GEMMs then are float32, on parts of a chunk.
        lora_b: [V, R] in the dtype of `lora_x`; they come together.
        scale: Factor on the logits, before the soft-cap.
        softcap: Logits become softcap * tanh(logits / softcap); None for none.
        ignore_index: Target of tokens that do not count; their row of the gradient is zero.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1].
        z_loss: Factor of lse^2, which is added to the loss of each token that counts.
        reduction: "mean" over the targets that count, "sum", or "none".
        num_items: Divides the sum in place of the number of targets that count: a number, or a 0-d tensor that is not read by
            the host. Only with "mean".
        valid_rows: Upper bound on the number of targets that count, known to the host. On a GPU it is what allows ignored
            tokens to be dropped without waiting for the device; a bound that is too low makes the loss NaN there.
        workspace_bytes: Memory for a chunk of logits; None for 128 MiB on a CPU, and on a GPU 256 MiB, or what 1024 tokens take.
            In a 16-bit dtype, None also keeps the chunks so few that the weight's gradient does not suffer.
        shard: Which rows of the vocabulary weight, bias and lora_b hold on this rank, where they are cut over the ranks of a process
            group; `target` stays a class of the whole. All ranks of the group make the same call, with the same hidden, lora_x and
            target; the loss is the same on all, and the gradients of hidden and lora_x are this rank's share, which the caller sums
            (`collectives.copy_to`). One all-gather of 20 bytes a token for each chunk. None for the whole vocabulary.
        implementation: "auto", "triton" or "torch".

    Returns:
        0-d, or [N] for "none", in float32 (float64 for float64). Differentiable once, in hidden,
            weight, bias, lora_x and lora_b.

    Raises:
        ValueError: shapes, dtypes or options do not fit, a target is out of range (CPU), or the implementation cannot serve the call.
    """
    tensors = Tensors(hidden, weight, bias, lora_x, lora_b)
    _check_tensors(tensors, target)
    check_options("linear_cross_entropy", softcap, label_smoothing, z_loss, reduction, num_items)
    _check_bounds(valid_rows, workspace_bytes)
    check_shard("linear_cross_entropy", "weight", weight.shape, weight.shape[0], shard)
    if num_items is not None and not isinstance(num_items, torch.Tensor):
        num_items = hidden.new_full((), num_items, dtype=compute_dtype(hidden), requires_grad=False)
    differentiated = torch.is_grad_enabled()
    needs = [differentiated and x is not None and x.requires_grad for x in tensors]
    options = (
        scale,
        softcap,
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        valid_rows,
        workspace_bytes,
        implementation,
        needs,
        *(("", 0, 0) if shard is None else (shard.group.group_name, shard.start, shard.vocab)),
    )
    return _call(*tensors, target, num_items, *options)[0]


def _check_tensors(tensors: Tensors, target: torch.Tensor) -> None:
    hidden, weight, bias, lora_x, lora_b = tensors

    def error(name: str, tensor: torch.Tensor, expected: str) -> ValueError:
        return ValueError(
            f"linear_cross_entropy: {name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, expected {expected}."
        )

    if hidden.dim() != 2:
        raise error("hidden", hidden, "[N, H]; flatten the leading dimensions")
    kind = f"{hidden.dtype} on {hidden.device}, as hidden {tuple(hidden.shape)}"
    like = hidden.dtype, hidden.device
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or (weight.dtype, weight.device) != like:
        raise error("weight", weight, f"(V, {hidden.shape[1]}) {kind}")
    if bias is not None and (bias.shape != weight.shape[:1] or (bias.dtype, bias.device) != like):
        raise error("bias", bias, f"({weight.shape[0]},) {kind}")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64 or target.device != hidden.device:
        raise error("target", target, f"({hidden.shape[0]},) torch.int64 on {hidden.device}")
    if lora_x is None and lora_b is None:
        return
    if lora_x is None or lora_b is None:
        raise ValueError("linear_cross_entropy: one of lora_x and lora_b is missing; expected both, or neither.")
    dtypes = {hidden.dtype, compute_dtype(hidden)}
    if lora_x.dim() != 2 or lora_x.shape[0] != hidden.shape[0] or lora_x.dtype not in dtypes:
        raise error("lora_x", lora_x, f"({hidden.shape[0]}, R) {' or '.join(sorted(map(str, dtypes)))}")
    shape = (weight.shape[0], lora_x.shape[1])
    if lora_b.shape != shape or lora_b.dtype != lora_x.dtype:
        raise error("lora_b", lora_b, f"{shape} {lora_x.dtype}, as lora_x {tuple(lora_x.shape)}")


def check_options(
    name: str,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    num_items: float | torch.Tensor | None,
) -> None:
    """Raise a ValueError for options that no loss takes; `name` is the operation's."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction {reduction!r} is unknown; expected one of {REDUCTIONS}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap is {softcap}, expected a positive number, or None for no soft-cap.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}, expected a share between 0 and 1.")
    if not z_loss >= 0:
        raise ValueError(f"{name}: z_loss is {z_loss}, expected a factor of at least 0.")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"{name}: num_items divides a mean, but reduction is {reduction!r}; leave one of them out.")
    if isinstance(num_items, torch.Tensor) and num_items.dim():
        raise ValueError(f"{name}: num_items has shape {tuple(num_items.shape)}, expected a number or a 0-d tensor.")
    if isinstance(num_items, int | float) and not num_items > 0:
        raise ValueError(f"{name}: num_items is {num_items}, expected a positive number.")


def check_targets(name: str, target: torch.Tensor, classes: int, ignore_index: int) -> int:
    """Raise a ValueError that names a target out of range; else return how many count. Only on a CPU: it reads values."""
    counting = target[target != ignore_index]
    wrong = counting[(counting < 0) | (counting >= classes)]
    if wrong.numel():
        raise ValueError(
            f"{name}: target {wrong[0].item()} is no class; expected 0 to {classes - 1}, "
            f"or ignore_index={ignore_index} for a token that does not count."
        )
    return counting.numel()


def _check_bounds(valid_rows: int | None, workspace_bytes: int | None) -> None:
    if valid_rows is not None and valid_rows < 0:
        raise ValueError(f"linear_cross_entropy: valid_rows is {valid_rows}, expected a number of targets.")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(
            f"linear_cross_entropy: workspace_bytes is {workspace_bytes}, expected at least 1, or None for the default."
        )


def check_shard(name: str, what: str, shape: torch.Size, rows: int, shard: VocabShard | None) -> None:
    """Raise a ValueError for a shard that is none, or not that of `what`, a tensor of that shape with `rows` classes."""
    if shard is None:
        return
    said = f"{name}: shard holds rows {shard.start} to {shard.stop} of a vocabulary of {shard.vocab}"
    if not 0 <= shard.start <= shard.stop <= shard.vocab:
        raise ValueError(f"{said}, expected 0 <= start <= stop <= vocab.")
    if rows != shard.stop - shard.start:
        raise ValueError(
            f"{said}, but {what} is {tuple(shape)}; expected the rows that this rank holds, and no others."
        )
    if not dist.is_initialized() or not isinstance(shard.group, dist.ProcessGroup):
        raise ValueError(
            f"{said}, but its group is {shard.group!r}; expected the process group of the ranks that hold the others."
        )


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_x: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    target: torch.Tensor,
    num_items: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    valid_rows: int | None,
    workspace_bytes: int | None,
    implementation: str,
    needs: list[bool],
    group: str = "",
    start: int = 0,
    vocab: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    given = (
        scale,
        softcap,
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        valid_rows,
        workspace_bytes,
        implementation,
        needs,
        group,
        start,
        vocab,
    )
    options = Options(*given)
    if target.device.type == "cpu":
        count = check_targets("linear_cross_entropy", target, vocab if group else weight.shape[0], ignore_index)
        if valid_rows is not None and count > valid_rows:
            raise ValueError(
                f"linear_cross_entropy: {count} targets count, but valid_rows promises at most {valid_rows}."
            )
    number = divisor(target, num_items, options, compute_dtype(hidden))
    wanted = needs if options.ready_in_forward(hidden.dtype) else [False] * len(needs)
    row_weight_N = (torch.ones_like(number) / number).expand(target.shape)
    tensors = Tensors(hidden, weight, bias, lora_x, lora_b)
    loss_N, grads = loss_and_gradients(_module(tensors, options), tensors, target, row_weight_N, options, wanted)
    loss = loss_N if reduction == "none" else loss_N.sum()
    return loss / number, *grads  # type: ignore[return-value]


def _backward(
    grad_output: torch.Tensor,
    ready: list[torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_x: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    target: torch.Tensor,
    num_items: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    valid_rows: int | None,
    workspace_bytes: int | None,
    implementation: str,
    needs: list[bool],
    group: str = "",
    start: int = 0,
    vocab: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    given = (
        scale,
        softcap,
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        valid_rows,
        workspace_bytes,
        implementation,
        needs,
        group,
        start,
        vocab,
    )
    options = Options(*given)
    grads = [grad.clone() for grad in ready]
    if not grads:
        once = torch.ones_like(grad_output) if options.ready_in_forward(hidden.dtype) else grad_output
        row_weight_N = (once / divisor(target, num_items, options, compute_dtype(hidden))).expand(target.shape)
        tensors = Tensors(hidden, weight, bias, lora_x, lora_b)
        _, grads = loss_and_gradients(_module(tensors, options), tensors, target, row_weight_N, options, needs)
    if options.ready_in_forward(hidden.dtype):
        _scale_all_(grads, grad_output, options.columns(weight), options)
    return tuple(grads)  # type: ignore[return-value]


def _module(tensors: Tensors, options: Options) -> Any:
    device, dtype = tensors.hidden.device.type, tensors.hidden.dtype
    return implementation_module(KERNEL, device, dtype, options.columns(tensors.weight), options.implementation)


def _fake_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_x: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    target: torch.Tensor,
    num_items: torch.Tensor | None,
    *given: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = Options(*given)
    loss = hidden.new_empty(target.shape if options.reduction == "none" else (), dtype=compute_dtype(hidden))
    wanted = options.needs if options.ready_in_forward(hidden.dtype) else [False] * len(options.needs)
    return loss, *empty_gradients(Tensors(hidden, weight, bias, lora_x, lora_b), wanted)  # type: ignore[return-value]


def _fake_backward(
    grad_output: torch.Tensor,
    ready: list[torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_x: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    target: torch.Tensor,
    num_items: torch.Tensor | None,
    *given: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = Tensors(hidden, weight, bias, lora_x, lora_b)
    return tuple(empty_gradients(tensors, Options(*given).needs))  # type: ignore[return-value]


def _scale_all_(grads: list[torch.Tensor], factor: torch.Tensor, vocab: int, options: Options) -> None:
    for grad in grads:
        module = implementation_module(KERNEL, grad.device.type, grad.dtype, vocab, options.implementation)
        module.scale_(grad, factor)


TENSORS = len(Tensors._fields) + 2  # and target and num_items


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.options = Options(*inputs[TENSORS:])
    ready = output[1:] if ctx.options.ready_in_forward(inputs[0].dtype) else ()
    ctx.save_for_backward(*inputs[:TENSORS], *ready)


def _gradients(ctx: Any, grad_output: torch.Tensor, backward: Any) -> tuple[Any, ...]:
    inputs, ready = ctx.saved_tensors[:TENSORS], list(ctx.saved_tensors[TENSORS:])
    return _one_per_input(ctx, backward(grad_output, ready, *inputs, *ctx.options))


def _setup_context_eager(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.options = Options(*inputs[TENSORS:])
    ctx.ready = list(output[1:]) if ctx.options.ready_in_forward(inputs[0].dtype) else []
    ctx.vocab = ctx.options.columns(inputs[1])
    ctx.save_for_backward(*inputs[:TENSORS])


def _gradients_eager(ctx: Any, grad_output: torch.Tensor, backward: Any) -> tuple[Any, ...]:
    """Hand out what forward computed, once: scaled in place, so that no second [V, H] exists. Afterwards compute anew."""
    if not ctx.ready:
        return _one_per_input(ctx, backward(grad_output, [], *ctx.saved_tensors, *ctx.options))
    grads, ctx.ready = ctx.ready, []
    _scale_all_(grads, grad_output, ctx.vocab, ctx.options)
    return _one_per_input(ctx, grads)


def _one_per_input(ctx: Any, grads: Any) -> tuple[Any, ...]:
    wanted = [grad if need else None for grad, need in zip(grads, ctx.options.needs, strict=True)]
    return *wanted, *[None] * (2 + len(ctx.options))


_call = register(
    "linear_cross_entropy",
    Definition(
        forward=_forward,
        backward=_backward,
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        gradients=_gradients,
        setup_context_eager=_setup_context_eager,
        gradients_eager=_gradients_eager,
    ),
)
