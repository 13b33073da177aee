"""Where a tensor came from, so that what consumes it can keep its source for backward in its place.

An operation that is cheap to run again (a norm, the activation of an MLP) notes on its output what it was computed from, which
its own backward keeps anyway. A linear that receives the output (kernels/linear) saves the source, and computes the output
again when it needs it. Nothing is kept alive by the note: it goes when the output goes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

NOTE = "_accel_source"  # attribute of the output

Tensors = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """What an output was computed from.

    Attributes:
        function: (*tensors) -> the output, bit by bit.
        tensors: Detached; an in-place write into one of them is noticed when it is needed, as by any saved tensor.
        version: How often the output had been written to.
        autocast: Dtype of the autocast region it was computed in, or None.
        region: What caught saved tensors there; see `region`.
    """

    function: Callable[..., torch.Tensor]
    tensors: Tensors
    version: int
    autocast: torch.dtype | None
    region: Any

    def again(self, tensors: Tensors) -> torch.Tensor:
        """The output, from the tensors as they were saved."""
        device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
        with torch.no_grad(), _autocast(device_type, self.autocast):
            return self.function(*tensors)


def remember(output: torch.Tensor, function: Callable[..., torch.Tensor], *tensors: torch.Tensor | None) -> None:
    """Note that `output` is `function(*tensors)`; only where gradients are recorded, outside of torch.compile."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    kind = output.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    detached = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    setattr(output, NOTE, Source(function, detached, output._version, autocast, region()))


def carry(x: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    """Note on `copy`, which has the values of `x`, what `x` was computed from; return it."""
    source = source_of(x)
    if copy is not x and source is not None:
        setattr(copy, NOTE, replace(source, version=copy._version))
    return copy


def source_of(x: Any) -> Source | None:
    """The source of this very tensor, or None: also where it was written to since, or crosses into a checkpoint."""
    found: Source | None = getattr(x, NOTE, None)
    return found if found is not None and found.version == x._version and found.region == region() else None


def region() -> Any:
    """What catches saved tensors at this moment: None, or the hooks of a checkpoint or of offloading.

    A checkpoint runs its part again when what is around it has long returned, and with inputs that lost what was noted on them.
    So what it computes may depend on nothing that was lazy, shared or noted outside of it.
    """
    return None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(True)


def _autocast(kind: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    if dtype is None:
        return torch.autocast(kind, enabled=False)
    return torch.autocast(kind, dtype, cache_enabled=False)
