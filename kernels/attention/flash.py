"""What the implementations by flash kernels share: their layouts, heads of one width, and packed rows as sequences.

The packages differ in the names of arguments; a `Kernel` here is their forward and backward behind one signature. Tensors are
token-major: [B, S, H, D], or [B S, H, D] where the rows are cut into sequences. Source: Dao, "FlashAttention-2", 2023.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

WIDTH_STEP = 8  # the kernels take heads whose width this divides


@dataclass(frozen=True, slots=True)
class Sequences:
    """The documents of all rows, one after another.

    Attributes:
        bounds: [n + 1] int32: where each begins, and the number of all tokens.
        longest: Tokens of the longest.
    """

    bounds: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Options:
    """What a call asks of a kernel."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    sequences: Sequences | None

    @property
    def reach(self) -> tuple[int, int]:
        """How many keys before and after its own a query sees; -1 for all."""
        return (-1 if self.window is None else self.window - 1), (0 if self.causal else -1)


Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Outputs = tuple[torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A package's kernels.

    Attributes:
        forward: (query, key, value, options) -> output and lse, [B, H, S] or [H, B S].
        backward: (grad_output, query, key, value, output, lse, options) -> gradients of query, key, value and of the sinks or None.
        widths: Pairs of a width of heads and another of values that it takes as they are.
    """

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Options], Outputs]
    backward: Callable[..., Gradients]
    widths: frozenset[tuple[int, int]] = frozenset()


def forward(
    kernel: Kernel,
    query_BHSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTE: torch.Tensor,
    sinks_H: torch.Tensor | None,
    documents_BS: torch.Tensor | None,
    mask: None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Outputs:
    """Return the output [B, H, S, E] in query's dtype, and lse [B, H, S] in float32."""
    batch, heads, queries, _ = query_BHSD.shape
    shape_BSHE = batch, queries, heads, value_BKTE.shape[-1]
    if 0 in (*query_BHSD.shape, *key_BKTD.shape):
        lse = query_BHSD.new_zeros(batch, heads, queries, dtype=torch.float32)
        return query_BHSD.new_zeros(shape_BSHE).transpose(1, 2), lse
    sequences = None if documents_BS is None else sequences_of(documents_BS, batch)
    options = Options(scale, causal, window, softcap, sinks_H, sequences)
    inputs = _laid_out(kernel, (query_BHSD, key_BKTD, value_BKTE), sequences)
    output, lse = kernel.forward(*inputs, options)
    output_BSHE = output.reshape(batch, queries, heads, -1)[..., : value_BKTE.shape[-1]].contiguous()
    lse_BHS = lse if sequences is None else lse.view(heads, batch, queries).transpose(0, 1).contiguous()
    return output_BSHE.transpose(1, 2), lse_BHS


def backward(
    kernel: Kernel,
    grad_output_BHSE: torch.Tensor,
    query_BHSD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTE: torch.Tensor,
    sinks_H: torch.Tensor | None,
    documents_BS: torch.Tensor | None,
    mask: None,
    output_BHSE: torch.Tensor,
    lse_BHS: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Gradients:
    """Return the gradients of query, key, value (and of the sinks, or None), each in its tensor's shape and dtype."""
    tensors = query_BHSD, key_BKTD, value_BKTE
    if 0 in (*query_BHSD.shape, *key_BKTD.shape):
        grads = [torch.zeros_like(tensor) for tensor in tensors]
        return grads[0], grads[1], grads[2], None if sinks_H is None else torch.zeros_like(sinks_H)
    sequences = None if documents_BS is None else sequences_of(documents_BS, query_BHSD.shape[0])
    options = Options(scale, causal, window, softcap, sinks_H, sequences)
    query, key, value = _laid_out(kernel, tensors, sequences)
    grad_output, output = (_token_major(x, value.shape[-1], sequences) for x in (grad_output_BHSE, output_BHSE))
    lse = lse_BHS if sequences is None else lse_BHS.transpose(0, 1).flatten(1).contiguous()
    *found, grad_sinks_H = kernel.backward(grad_output, query, key, value, output, lse, options)
    grad_query, grad_key, grad_value = (
        grad.reshape(x.shape[0], x.shape[2], x.shape[1], -1)[..., : x.shape[3]].transpose(1, 2)
        for grad, x in zip(found, tensors, strict=True)
    )
    return grad_query, grad_key, grad_value, grad_sinks_H


def _laid_out(
    kernel: Kernel, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], sequences: Sequences | None
) -> Triple:
    """Token-major; where the kernel does not take the widths, zeros fill them up, which change neither scores nor other values."""
    width, value_width = tensors[1].shape[-1], tensors[2].shape[-1]
    if (width, value_width) not in kernel.widths:
        widest = max(width, value_width)
        width = value_width = -(-widest // WIDTH_STEP) * WIDTH_STEP
    query, key, value = tensors
    return (
        _token_major(query, width, sequences),
        _token_major(key, width, sequences),
        _token_major(value, value_width, sequences),
    )


def _token_major(x_BHSD: torch.Tensor, width: int, sequences: Sequences | None) -> torch.Tensor:
    x_BSHD = F.pad(x_BHSD, (0, width - x_BHSD.shape[-1])) if x_BHSD.shape[-1] < width else x_BHSD
    x_BSHD = x_BSHD.transpose(1, 2)
    x_BSHD = x_BSHD if x_BSHD.stride(-1) == 1 else x_BSHD.contiguous()
    return x_BSHD if sequences is None else x_BSHD.flatten(0, 1)


_last: dict[torch.device, tuple[Callable[[], torch.Tensor | None], int, int, Sequences]] = {}


def sequences_of(documents_BS: torch.Tensor, batch: int) -> Sequences:
    """The sequences of packed rows; the numbers are read from the device once for all layers that get the same tensor."""
    if documents_BS.is_inference():
        return _read(documents_BS, batch)
    at, version, rows, found = _last.get(documents_BS.device, (lambda: None, 0, 0, None))
    if found is None or at() is not documents_BS or (version, rows) != (documents_BS._version, batch):
        found = _read(documents_BS, batch)
        _last[documents_BS.device] = weakref.ref(documents_BS), documents_BS._version, batch, found
    return found


def _read(documents_BS: torch.Tensor, batch: int) -> Sequences:
    numbers = documents_BS.expand(batch, -1)
    begins = torch.ones(numbers.shape, dtype=torch.bool, device=numbers.device)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    at = begins.cpu().flatten().nonzero()[:, 0]
    bounds = torch.cat([at, at.new_tensor([begins.numel()])])
    longest = int(bounds.diff().max())
    return Sequences(bounds.to(torch.int32).to(numbers.device, non_blocking=True), longest)
