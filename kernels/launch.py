"""What launches share: the rows of a tensor, how many programs, how many warps."""

import functools

import torch

from automodel_accel.kernels.facts import this_machine

INTERPRETED_PROGRAMS = 3  # few, so that on small test shapes each persistent program walks several rows


@functools.cache
def persistent_programs(device: torch.device, per_processor: int) -> int:
    """Programs of a persistent grid: `per_processor` on each streaming multiprocessor of the device."""
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count * per_processor
    return this_machine().processors * per_processor


def row_warps(block: int) -> int:
    """Warps for a program that holds a row of `block` elements: 8 elements a thread, between 4 and 32 warps."""
    return min(max(block // 256, 4), 32)


def rows(x: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [N, H] with unit stride inside a row; a copy only where no view exists."""
    x_NH = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x_NH if x_NH.stride(-1) == 1 else x_NH.contiguous()
