"""The loop over chunks of tokens: GEMMs around an implementation's kernel.

A GEMM puts a chunk's logits into one reused buffer, the kernel turns them in place into their gradient and the loss, and GEMMs
add what it brings to the gradients. The low-rank term of a LoRA'd head is added to that same buffer. Where the adapter is
float32 and the head is not, its GEMMs are float32: parts of the chunk are widened for them, and the sum is rounded once.
Letters: N tokens, C tokens of a chunk, V vocabulary, H hidden size, R rank.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist

from automodel_accel.kernels.linear_cross_entropy.shard import Sharded, named_group

CPU_WORKSPACE_BYTES = 128 << 20  # half of it costs 5 % of the time, twice as much gains 5 %
GPU_WORKSPACE_BYTES = 256 << 20
GPU_CHUNK = (1024, 4096)  # shorter: adding to dweight costs more than its GEMM; longer: nothing is gained
MAX_NARROW_CHUNKS = (
    32  # each chunk rounds dweight once more to a 16-bit dtype; 32 times stay below one unit in the last place
)
ROW_ALIGNMENT = 16  # elements; keeps the kernel's and the GEMMs' words wide where the vocabulary is odd
WIDENED_PARTS = 4  # of a chunk, one at a time: a part in float32 takes half of what the chunk takes in 16 bit


class Tensors(NamedTuple):
    """What logits are made of: hidden @ weight.T + bias + lora_x @ lora_b.T; and, in the same order, their gradients."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_x: torch.Tensor | None
    lora_b: torch.Tensor | None


class Options(NamedTuple):
    """The last arguments of the registered operations; see `linear_cross_entropy`.

    Attributes:
        needs: Whether each of `Tensors` needs a gradient.
        group, start, vocab: Of a `VocabShard`, its group by name; "" where this rank holds the whole vocabulary.
    """

    scale: float
    softcap: float | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    reduction: str
    valid_rows: int | None
    workspace_bytes: int | None
    implementation: str
    needs: list[bool]
    group: str = ""
    start: int = 0
    vocab: int = 0

    @property
    def loss(self) -> tuple[float, float | None, int, float, float]:
        """What an implementation takes after its tensors."""
        return self[:5]

    def ready_in_forward(self, dtype: torch.dtype) -> bool:
        """Whether the gradients are computed in forward, up to the factor grad_output."""
        return any(self.needs) and self.reduction != "none" and dtype != torch.float16

    def columns(self, weight: torch.Tensor) -> int:
        """How many classes a chunk's logits have; where they are cut over ranks, the same on all of these."""
        return -(-self.vocab // dist.get_world_size(named_group(self.group))) if self.group else weight.shape[0]


def loss_and_gradients(
    module: ModuleType,
    tensors: Tensors,
    target_N: torch.Tensor,
    row_weight_N: torch.Tensor,
    options: Options,
    wanted: list[bool],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of each row, and the wanted gradients of sum(row_weight * loss); those not wanted are empty."""
    hidden_NH, vocab = tensors.hidden, tensors.weight.shape[0]
    step = Sharded(module, named_group(options.group), options.start, options.vocab) if options.group else module
    order = _order(target_N, options)
    n_rows = target_N.shape[0] if order is None else order.shape[0]
    chunk = chunk_rows(n_rows, options.columns(tensors.weight), hidden_NH, options.workspace_bytes)
    loss_N = hidden_NH.new_zeros(target_N.shape, dtype=compute_dtype(hidden_NH))
    logits_CP = hidden_NH.new_empty(chunk, -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT)
    gradients = _Gradients(tensors, wanted, chunk, n_rows)
    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows)) if order is None else order[start : start + chunk]
        target_C = target_N[rows]
        z_CV = logits_CP[: target_C.shape[0], :vocab]
        _put_logits(z_CV, tensors, rows)
        if any(wanted):
            loss_N[rows] = step.backward(z_CV, target_C, row_weight_N[rows], *options.loss)
            gradients.add(z_CV, rows, start == 0)
        else:
            loss_N[rows] = step.forward(z_CV, target_C, *options.loss)
    return loss_N, gradients.finished()


# torch's out= and in-place forms, which autocast leaves alone


def _put_logits(z_CV: torch.Tensor, tensors: Tensors, rows: torch.Tensor | slice) -> None:
    hidden_CH, weight_HV = tensors.hidden[rows], tensors.weight.t()
    if tensors.bias is None:
        torch.mm(hidden_CH, weight_HV, out=z_CV)
    else:
        torch.addmm(tensors.bias, hidden_CH, weight_HV, out=z_CV)
    if tensors.lora_x is None or tensors.lora_b is None:
        return
    lora_x_CR, lora_b_RV = tensors.lora_x[rows], tensors.lora_b.t()
    for part, wide in _widened(z_CV, lora_x_CR.dtype):
        wide.addmm_(lora_x_CR[part], lora_b_RV)
        if wide.dtype != z_CV.dtype:
            z_CV[part] = wide


def _widened(z_CV: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Parts of a chunk's rows in `dtype`; the chunk itself where it has that dtype."""
    size = z_CV.shape[0] if z_CV.dtype == dtype else -(-z_CV.shape[0] // WIDENED_PARTS)
    for start in range(0, z_CV.shape[0], size):
        part = slice(start, start + size)
        yield part, z_CV[part].to(dtype)


class _Gradients:
    """The gradients, chunk by chunk."""

    def __init__(self, tensors: Tensors, wanted: list[bool], chunk: int, n_rows: int) -> None:
        self.of, self.wanted = tensors, wanted
        self.hidden_NH, self.weight_VH, self.bias_V, self.lora_x_NR, self.lora_b_VR = empty_gradients(tensors, wanted)
        for of_rows in (self.hidden_NH, self.lora_x_NR):
            of_rows.zero_()  # rows that are dropped
        if n_rows == 0:
            self.weight_VH.zero_()
            self.lora_b_VR.zero_()
        self.bias_wide = self.bias_V.new_zeros(self.bias_V.shape, dtype=compute_dtype(self.bias_V))
        self.product_CH = tensors.hidden.new_empty(chunk if wanted[0] else 0, tensors.hidden.shape[1])

    def add(self, z_CV: torch.Tensor, rows: torch.Tensor | slice, first: bool) -> None:
        """Add what one chunk brings; `z_CV` is the gradient with respect to its logits."""
        if self.wanted[0]:
            self.hidden_NH[rows] = torch.mm(z_CV, self.of.weight, out=self.product_CH[: z_CV.shape[0]])
        if self.wanted[1]:
            _accumulate(self.weight_VH, z_CV, self.of.hidden[rows], first)
        if self.wanted[2]:
            self.bias_wide.add_(z_CV.sum(0))
        if self.wanted[3] or self.wanted[4]:
            self._add_low_rank(z_CV, rows, first)

    def _add_low_rank(self, z_CV: torch.Tensor, rows: torch.Tensor | slice, first: bool) -> None:
        assert self.of.lora_x is not None
        assert self.of.lora_b is not None
        lora_x_CR = self.of.lora_x[rows]
        product_CR = torch.empty_like(lora_x_CR)
        for part, wide in _widened(z_CV, lora_x_CR.dtype):
            if self.wanted[3]:
                torch.mm(wide, self.of.lora_b, out=product_CR[part])
            if self.wanted[4]:
                _accumulate(self.lora_b_VR, wide, lora_x_CR[part], first and part.start == 0)
        if self.wanted[3]:
            self.lora_x_NR[rows] = product_CR

    def finished(self) -> list[torch.Tensor]:
        """One gradient per tensor."""
        self.bias_V.copy_(self.bias_wide)
        return [self.hidden_NH, self.weight_VH, self.bias_V, self.lora_x_NR, self.lora_b_VR]


def _accumulate(total: torch.Tensor, z_CV: torch.Tensor, x: torch.Tensor, first: bool) -> None:
    if first:
        torch.mm(z_CV.t(), x, out=total)
    else:
        total.addmm_(z_CV.t(), x)


def empty_gradients(tensors: Tensors, wanted: list[bool]) -> list[torch.Tensor]:
    """Memory for each wanted gradient; nothing for the others."""
    return [
        tensors.hidden.new_empty(0) if x is None else x.new_empty(x.shape if want else (0,))
        for x, want in zip(tensors, wanted, strict=True)
    ]


def _order(target_N: torch.Tensor, options: Options) -> torch.Tensor | None:
    """Indices of the rows to work on; None for all of them. Nothing here makes the host wait for a GPU."""
    ignored_N = target_N == options.ignore_index
    if options.valid_rows is not None:
        return torch.argsort(ignored_N.to(torch.uint8), stable=True)[: options.valid_rows]
    return rows_that_count(~ignored_N)


def rows_that_count(counted_N: torch.Tensor) -> torch.Tensor | None:
    """Their indices; None for all rows: off the CPU the host would have to wait for their number."""
    if counted_N.device.type != "cpu" or counted_N.all():
        return None
    return torch.nonzero(counted_N)[:, 0]


def chunk_rows(n_rows: int, vocab: int, hidden: torch.Tensor, workspace_bytes: int | None) -> int:
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


def divisor(target: torch.Tensor, num_items: torch.Tensor | None, options: Options, dtype: torch.dtype) -> torch.Tensor:
    """What divides the sum, 0-d on the device; NaN where more targets count than `valid_rows` promises."""
    count = (target != options.ignore_index).sum()
    if options.reduction != "mean":
        found = torch.ones((), dtype=dtype, device=target.device)
    elif num_items is None:
        found = count.to(dtype)
    else:
        found = num_items.to(target.device, dtype, non_blocking=True)
    return found if options.valid_rows is None else torch.where(count > options.valid_rows, torch.nan, found)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
