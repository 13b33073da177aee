"""linear_cross_entropy: output head and cross entropy in one operation that never builds the logits.

    z = scale * (hidden @ weight.T + bias)      or softcap * tanh(that / softcap)           lse = log(sum over V of exp(z))
    loss = lse - (1 - s) z_target - s mean over V of z                                      with label smoothing s

    dz = w (exp(z - lse) - s / V - (1 - s) [v = target])      w = grad_output / number of targets, times scale (1 - tanh^2)
    dhidden = dz @ weight          dweight = dz.T @ hidden          dbias = sum over rows of dz

Tokens are worked off in chunks: a GEMM puts a chunk's logits into one reused buffer, a kernel turns them in place into dz and
the loss, and GEMMs add what dz brings to the gradients. The gradients of the mean and of the sum are thus ready when the loss
is, and backward scales them. A vector of losses, float16 (whose range is too narrow for gradients of an unknown scale) and a
second backward through one graph compute them in backward, from hidden and weight, by the same loop.
Targets that are ignored are dropped before the first GEMM.

Beyond inputs and gradients it needs one chunk: no [N, V], no second [V, H]. Floor: 6 N H V FLOPs, 2 N H V of which each of a
frozen hidden and a frozen weight spares. Sources: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024;
Hsu et al., "Liger Kernel", 2024 (gradients in the forward pass).
"""

from typing import Any, NamedTuple

import torch

from automodel_accel.kernels.contract import AUTO, Kernel, implementation_module, in_torch, in_triton
from automodel_accel.kernels.linear_cross_entropy import reference
from automodel_accel.kernels.registration import Definition, register

REDUCTIONS = ("mean", "sum", "none")
CPU_WORKSPACE_BYTES = 128 << 20  # half of it costs 5 % of the time, twice as much gains 5 %
GPU_WORKSPACE_BYTES = 256 << 20
GPU_CHUNK = (1024, 4096)  # shorter: adding to dweight costs more than its GEMM; longer: nothing is gained
MAX_NARROW_CHUNKS = (
    32  # each chunk rounds dweight once more to a 16-bit dtype; 32 times stay below one unit in the last place
)
ROW_ALIGNMENT = 16  # elements; keeps the kernel's and the GEMMs' words wide where the vocabulary is odd

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
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: float | torch.Tensor | None = None,
    valid_rows: int | None = None,
    workspace_bytes: int | None = None,
    implementation: str = AUTO,
) -> torch.Tensor:
    """Cross entropy of the logits scale * (hidden @ weight.T + bias), which are never built as a whole.

    Logits are rounded to the dtype of `hidden` as a linear layer rounds them; all else is float32 (float64 for float64). The loss
    is that of `torch.nn.functional.cross_entropy`: NaN for a mean over no target at all, with gradients of zero.

    Args:
        hidden: [N, H], float32, bfloat16, float16 (or float64 for "torch").
        weight: [V, H] in the same dtype.
        target: [N], int64: a class in [0, V), or `ignore_index`. Anything else is an error on a CPU. On a GPU nothing waits for
            the host: there it makes the loss NaN in "triton", and trips torch's device-side assertion in "torch".
        bias: [V] in the same dtype.
        scale: Factor on the logits, before the soft-cap.
        softcap: Logits become softcap * tanh(logits / softcap); None for none.
        ignore_index: Target of tokens that do not count; their row of the gradient is zero.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1].
        reduction: "mean" over the targets that count, "sum", or "none".
        num_items: Divides the sum in place of the number of targets that count: a number, or a 0-d tensor that is not read by
            the host. Only with "mean".
        valid_rows: Upper bound on the number of targets that count, known to the host. On a GPU it is what allows ignored
            tokens to be dropped without waiting for the device; a bound that is too low makes the loss NaN there.
        workspace_bytes: Memory for a chunk of logits; None for 128 MiB on a CPU, and on a GPU 256 MiB, or what 1024 tokens take.
            In a 16-bit dtype, None also keeps the chunks so few that the weight's gradient does not suffer.
        implementation: "auto", "triton" or "torch".

    Returns:
        0-d, or [N] for "none", in float32 (float64 for float64). Differentiable once, in hidden, weight and bias.

    Raises:
        ValueError: shapes, dtypes or options do not fit, a target is out of range (CPU), or the implementation cannot serve the call.
    """
    _check_tensors(hidden, weight, target, bias)
    _check_options(softcap, label_smoothing, reduction, num_items, valid_rows, workspace_bytes)
    if num_items is not None and not isinstance(num_items, torch.Tensor):
        num_items = hidden.new_full((), num_items, dtype=_compute_dtype(hidden), requires_grad=False)
    differentiated = torch.is_grad_enabled()
    needs = [differentiated and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    options = (
        scale,
        softcap,
        ignore_index,
        label_smoothing,
        reduction,
        valid_rows,
        workspace_bytes,
        implementation,
        needs,
    )
    return _call(hidden, weight, bias, target, num_items, *options)[0]


def _check_tensors(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None) -> None:
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


def _check_options(
    softcap: float | None,
    label_smoothing: float,
    reduction: str,
    num_items: float | torch.Tensor | None,
    valid_rows: int | None,
    workspace_bytes: int | None,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction {reduction!r} is unknown; expected one of {REDUCTIONS}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(
            f"linear_cross_entropy: softcap is {softcap}, expected a positive number, or None for no soft-cap."
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"linear_cross_entropy: label_smoothing is {label_smoothing}, expected a share between 0 and 1."
        )
    if num_items is not None and reduction != "mean":
        raise ValueError(
            f"linear_cross_entropy: num_items divides a mean, but reduction is {reduction!r}; leave one of them out."
        )
    if isinstance(num_items, torch.Tensor) and num_items.dim():
        raise ValueError(
            f"linear_cross_entropy: num_items has shape {tuple(num_items.shape)}, expected a number or a 0-d tensor."
        )
    if isinstance(num_items, int | float) and not num_items > 0:
        raise ValueError(f"linear_cross_entropy: num_items is {num_items}, expected a positive number.")
    if valid_rows is not None and valid_rows < 0:
        raise ValueError(f"linear_cross_entropy: valid_rows is {valid_rows}, expected a number of targets.")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(
            f"linear_cross_entropy: workspace_bytes is {workspace_bytes}, expected at least 1, or None for the default."
        )


class _Options(NamedTuple):
    """The last arguments of the registered operations; see `linear_cross_entropy`.

    Attributes:
        needs: Whether hidden, weight and bias need a gradient.
    """

    scale: float
    softcap: float | None
    ignore_index: int
    label_smoothing: float
    reduction: str
    valid_rows: int | None
    workspace_bytes: int | None
    implementation: str
    needs: list[bool]

    @property
    def loss(self) -> tuple[float, float | None, int, float]:
        """What an implementation takes after its tensors."""
        return self[:4]

    def ready_in_forward(self, dtype: torch.dtype) -> bool:
        """Whether the gradients are computed in forward, up to the factor grad_output."""
        return any(self.needs) and self.reduction != "none" and dtype != torch.float16


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    num_items: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    valid_rows: int | None,
    workspace_bytes: int | None,
    implementation: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    given = (
        scale,
        softcap,
        ignore_index,
        label_smoothing,
        reduction,
        valid_rows,
        workspace_bytes,
        implementation,
        needs,
    )
    options = _Options(*given)
    if target.device.type == "cpu":
        _check_targets(target, weight.shape[0], options)
    divisor = _divisor(target, num_items, options, _compute_dtype(hidden))
    wanted = needs if options.ready_in_forward(hidden.dtype) else [False] * 3
    row_weight_N = (torch.ones_like(divisor) / divisor).expand(target.shape)
    loss_N, *grads = _in_chunks(hidden, weight, bias, target, row_weight_N, options, wanted)
    loss = loss_N if reduction == "none" else loss_N.sum()
    return loss / divisor, grads[0], grads[1], grads[2]


def _backward(
    grad_output: torch.Tensor,
    ready: list[torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    num_items: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    valid_rows: int | None,
    workspace_bytes: int | None,
    implementation: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given = (
        scale,
        softcap,
        ignore_index,
        label_smoothing,
        reduction,
        valid_rows,
        workspace_bytes,
        implementation,
        needs,
    )
    options = _Options(*given)
    grads = [grad.clone() for grad in ready]
    if not grads:
        once = torch.ones_like(grad_output) if options.ready_in_forward(hidden.dtype) else grad_output
        row_weight_N = (once / _divisor(target, num_items, options, _compute_dtype(hidden))).expand(target.shape)
        grads = list(_in_chunks(hidden, weight, bias, target, row_weight_N, options, needs)[1:])
    if options.ready_in_forward(hidden.dtype):
        _scale_all_(grads, grad_output, weight.shape[0], options)
    return grads[0], grads[1], grads[2]


def _in_chunks(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_N: torch.Tensor,
    row_weight_N: torch.Tensor,
    options: _Options,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of each row, and the wanted gradients of sum(row_weight * loss); those not wanted are empty."""
    vocab = weight_VH.shape[0]
    module = implementation_module(KERNEL, hidden_NH.device.type, hidden_NH.dtype, vocab, options.implementation)
    order = _order(target_N, options)
    n_rows = target_N.shape[0] if order is None else order.shape[0]
    chunk = _chunk_rows(n_rows, vocab, hidden_NH, options.workspace_bytes)

    loss_N = hidden_NH.new_zeros(target_N.shape, dtype=_compute_dtype(hidden_NH))
    grad_hidden_NH, grad_weight_VH, grad_bias_V = _empty_gradients(hidden_NH, weight_VH, bias_V, wanted)
    grad_hidden_NH.zero_()
    if n_rows == 0:
        grad_weight_VH.zero_()
    grad_bias_wide = grad_bias_V.new_zeros(grad_bias_V.shape, dtype=loss_N.dtype)
    logits_CP = hidden_NH.new_empty(chunk, -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT)
    product_CH = hidden_NH.new_empty(chunk if wanted[0] else 0, hidden_NH.shape[1])

    # torch's out= and in-place forms, which autocast leaves alone
    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows)) if order is None else order[start : start + chunk]
        hidden_CH, target_C = hidden_NH[rows], target_N[rows]
        z_CV = logits_CP[: target_C.shape[0], :vocab]
        if bias_V is None:
            torch.mm(hidden_CH, weight_VH.t(), out=z_CV)
        else:
            torch.addmm(bias_V, hidden_CH, weight_VH.t(), out=z_CV)
        if not any(wanted):
            loss_N[rows] = module.forward(z_CV, target_C, *options.loss)
            continue
        loss_N[rows] = module.backward(z_CV, target_C, row_weight_N[rows], *options.loss)
        if wanted[0]:
            grad_hidden_NH[rows] = torch.mm(z_CV, weight_VH, out=product_CH[: z_CV.shape[0]])
        if wanted[1] and start == 0:
            torch.mm(z_CV.t(), hidden_CH, out=grad_weight_VH)
        elif wanted[1]:
            grad_weight_VH.addmm_(z_CV.t(), hidden_CH)
        if wanted[2]:
            grad_bias_wide.add_(z_CV.sum(0))
    return loss_N, grad_hidden_NH, grad_weight_VH, grad_bias_V.copy_(grad_bias_wide)


def _order(target_N: torch.Tensor, options: _Options) -> torch.Tensor | None:
    """Indices of the rows to work on; None for all of them. Nothing here makes the host wait for a GPU."""
    ignored_N = target_N == options.ignore_index
    if options.valid_rows is not None:
        return torch.argsort(ignored_N.to(torch.uint8), stable=True)[: options.valid_rows]
    if target_N.device.type != "cpu" or not ignored_N.any():
        return None
    return torch.nonzero(~ignored_N)[:, 0]


def _chunk_rows(n_rows: int, vocab: int, hidden: torch.Tensor, workspace_bytes: int | None) -> int:
    """Rows of a chunk: as many as the workspace holds, in chunks of even length."""
    row_bytes = max(vocab, 1) * hidden.element_size()
    if workspace_bytes is not None:
        most = max(workspace_bytes // row_bytes, 1)
    elif hidden.device.type == "cpu":
        most = max(CPU_WORKSPACE_BYTES // row_bytes, 1)
    else:
        most = min(max(GPU_WORKSPACE_BYTES // row_bytes, GPU_CHUNK[0]), GPU_CHUNK[1])
    if workspace_bytes is None and hidden.element_size() < 4:
        most = max(most, -(-n_rows // MAX_NARROW_CHUNKS))
    chunks = max(-(-n_rows // most), 1)
    return max(-(-n_rows // chunks), 1)


def _divisor(
    target: torch.Tensor, num_items: torch.Tensor | None, options: _Options, dtype: torch.dtype
) -> torch.Tensor:
    """What divides the sum, 0-d on the device; NaN where more targets count than `valid_rows` promises."""
    count = (target != options.ignore_index).sum()
    if options.reduction != "mean":
        divisor = torch.ones((), dtype=dtype, device=target.device)
    elif num_items is None:
        divisor = count.to(dtype)
    else:
        divisor = num_items.to(target.device, dtype, non_blocking=True)
    return divisor if options.valid_rows is None else torch.where(count > options.valid_rows, torch.nan, divisor)


def _check_targets(target: torch.Tensor, vocab: int, options: _Options) -> None:
    counting = target[target != options.ignore_index]
    wrong = counting[(counting < 0) | (counting >= vocab)]
    if wrong.numel():
        raise ValueError(
            f"linear_cross_entropy: target {wrong[0].item()} is no class; expected 0 to {vocab - 1}, "
            f"or ignore_index={options.ignore_index} for a token that does not count."
        )
    if options.valid_rows is not None and counting.numel() > options.valid_rows:
        raise ValueError(
            f"linear_cross_entropy: {counting.numel()} targets count, but valid_rows promises at most {options.valid_rows}."
        )


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _empty_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = [hidden.shape, weight.shape, weight.shape[:1]]
    grads = [hidden.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)]
    return grads[0], grads[1], grads[2]


def _fake_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    num_items: torch.Tensor | None,
    *given: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = _Options(*given)
    loss = hidden.new_empty(target.shape if options.reduction == "none" else (), dtype=_compute_dtype(hidden))
    wanted = options.needs if options.ready_in_forward(hidden.dtype) else [False] * 3
    return loss, *_empty_gradients(hidden, weight, bias, wanted)


def _fake_backward(
    grad_output: torch.Tensor,
    ready: list[torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    num_items: torch.Tensor | None,
    *given: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_gradients(hidden, weight, bias, _Options(*given).needs)


def _scale_all_(grads: list[torch.Tensor], factor: torch.Tensor, vocab: int, options: _Options) -> None:
    for grad in grads:
        module = implementation_module(KERNEL, grad.device.type, grad.dtype, vocab, options.implementation)
        module.scale_(grad, factor)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.options = _Options(*inputs[5:])
    ready = output[1:] if ctx.options.ready_in_forward(inputs[0].dtype) else ()
    ctx.save_for_backward(*inputs[:5], *ready)


def _gradients(ctx: Any, grad_output: torch.Tensor, backward: Any) -> tuple[Any, ...]:
    inputs, ready = ctx.saved_tensors[:5], list(ctx.saved_tensors[5:])
    return _one_per_input(ctx, backward(grad_output, ready, *inputs, *ctx.options))


def _setup_context_eager(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.options = _Options(*inputs[5:])
    ctx.ready = list(output[1:]) if ctx.options.ready_in_forward(inputs[0].dtype) else []
    ctx.vocab = inputs[1].shape[0]
    ctx.save_for_backward(*inputs[:5])


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
