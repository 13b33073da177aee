"""What launches share: the rows of a tensor, how many programs, how many warps."""

import functools

import torch

from automodel_accel.kernels.facts import this_machine

INTERPRETED_PROGRAMS = 3  # few, so that on small test shapes each persistent program walks several rows
WARP_LANES = 64 if torch.version.hip else 32
PREFETCH_BYTES = 72 * 1024  # of one program: every GPU since 2020 has them, an A100 or H100 for two programs at once


@functools.cache
def persistent_programs(device: torch.device, per_processor: int) -> int:
    """Programs of a persistent grid: `per_processor` on each streaming multiprocessor of the device."""
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count * per_processor
    return this_machine().processors * per_processor


def row_warps(block: int) -> int:
    """Warps for a program that holds a row of `block` elements: 8 elements a thread, at least 4 warps, at most 1024 threads."""
    return min(max(block // (8 * WARP_LANES), 4), 1024 // WARP_LANES)


def prefetch_stages(row_bytes: int) -> int:
    """Stages of a `tl.range` over rows: 3 keep the next two rows in shared memory; 1, no prefetch, where these are too long."""
    return 3 if 2 * row_bytes <= PREFETCH_BYTES else 1


def next_power_of_2(n: int) -> int:
    """The power of 2 that is n or the next one above it; 1 for 0. Triton's own takes 5 us of host time a call."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(n: int, size: int) -> int:
    """How many parts of `size` hold n; without the host time of Triton's own."""
    return -(-n // size)


def rows(x: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [N, H] with unit stride inside a row; a copy only where no view exists."""
    x_NH = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x_NH if x_NH.stride(-1) == 1 else x_NH.contiguous()
