"""Liger's kernels in Triton's interpreter, which lacks two things that they use; only bytes are counted, no value is trusted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


@contextmanager
def runnable() -> Iterator[None]:
    """Give the interpreter scalar arguments that have `.to`, and Liger's kernels the functions of libdevice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", _with_scalars(interpreter._implicit_cvt))
        patch.setattr(import_module("liger_kernel.ops.geglu"), "tanh", _computed(np.tanh))
        for name in ("rms_norm", "layer_norm", "fused_add_rms_norm"):
            patch.setattr(import_module(f"liger_kernel.ops.{name}"), "rsqrt", _computed(lambda x: 1 / np.sqrt(x)))
        yield


def _with_scalars(original: Any) -> Any:
    def convert(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return original(argument)

    return convert


def _computed(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: tl.tensor(TensorHandle(function(x.handle.data), tl.float32), x.type)
