"""The 8-bit formats of a machine, and the scale that a tensor takes in one of them.

    scale = 2^ceil(log2(amax / max))             q = round(x / scale), saturated at +-max

Scales are powers of two: dividing by one rounds nothing, so that a cast rounds once, a product of casts is exact until it is
accumulated, and one implementation can be held to the bits of another. In a floating point format that costs nothing: measured on
normal, uniform and Student's values, the error of a product differs by less than 0.3 dB from that of scales that use all of the range.

A scale is never 0 nor, of finite values, infinite: below 2^-110 it stays there. Where amax is infinite or NaN it is that, and so is
the scale: every value becomes NaN, and a loop that skips such steps sees it. Source: Micikevicius et al., "FP8 Formats for Deep
Learning", 2022.
"""

import functools
import math
from dataclasses import dataclass

import torch

from automodel_accel.kernels.facts import this_machine

LEAST = 127 - 110  # biased exponent of the least scale
MANTISSA_BITS, MANTISSA, NOT_FINITE = 23, (1 << 23) - 1, 255  # of a float32
FNUZ = ("gfx940", "gfx941", "gfx942")  # architectures whose formats have one zero and no infinity


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of one machine.

    Attributes:
        e4m3: Of values: 3 bits of mantissa.
        e5m2: Of gradients of a wide range: 2 bits of mantissa.
    """

    e4m3: torch.dtype
    e5m2: torch.dtype


def formats_of(arch: str) -> Formats:
    """The formats that an architecture multiplies in."""
    if arch.startswith(FNUZ):
        return Formats(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
    return Formats(torch.float8_e4m3fn, torch.float8_e5m2)


def formats_here() -> Formats:
    """The formats of this machine."""
    return formats_of(this_machine().arch)


def scale_of(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale of values up to `amax`, float32 of any shape, in the 8-bit format `dtype`: float32 of that shape, on the device."""
    bits = amax.contiguous().view(torch.int32)
    exponent, mantissa = bits >> MANTISSA_BITS & NOT_FINITE, bits & MANTISSA  # a NaN may have a sign
    largest = parts_of_largest(dtype)
    biased = exponent - largest[0] + (mantissa > largest[1]).int()
    scale = (biased.clamp(min=LEAST) << MANTISSA_BITS).view(torch.float32)
    return torch.where(exponent == NOT_FINITE, amax, scale)


@functools.cache
def parts_of_largest(dtype: torch.dtype) -> tuple[int, int]:
    """Exponent (unbiased) and mantissa, as of a float32, of the largest finite value of an 8-bit format."""
    half_to_one, exponent = math.frexp(torch.finfo(dtype).max)
    return exponent - 1, int((2 * half_to_one - 1) * (MANTISSA + 1))
