"""What a benchmark is: an operation, its sizes, and variants that do the same work on the same inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Sizes = Mapping[str, int | float]
Inputs = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One benchmark.

    Attributes:
        name: Of the operation.
        about: What is compared, in one line.
        tests: Arguments for pytest: the tests that must be green before a speed is printed.
        sizes: The default of each size; each is an option of the command line.
        quick: Sizes that take a second.
        inputs: (sizes, dtype, device) -> tensors, made without temporary memory, which would hide in the baseline of the peak.
        variants: Name -> forward and backward on the inputs. The first one is what the others are compared with.
        flops: Floating-point operations that the sizes ask for, of any variant.
        bytes_floor: (sizes, bytes of an element) -> the least bytes that must move between memory and processor.
    """

    name: str
    about: str
    tests: tuple[str, ...]
    sizes: Sizes
    quick: Sizes
    inputs: Callable[[Sizes, torch.dtype, str], Inputs]
    variants: Mapping[str, Callable[[Inputs], None]]
    flops: Callable[[Sizes], float]
    bytes_floor: Callable[[Sizes, int], float]
