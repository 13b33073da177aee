"""Liger's kernels in Triton's interpreter, which lacks what they ask: the functions of libdevice, and scalars that are tensors."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


@triton.jit
def _rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def _tanh(x):
    wide = tl.exp(-2.0 * tl.abs(x.to(tl.float64)))  # libdevice's is right to the last bits
    tanh = (1.0 - wide) / (1.0 + wide)
    return tl.where(x < 0.0, -tanh, tanh).to(tl.float32)


@contextmanager
def runnable() -> Iterator[None]:
    """While it is open, Liger's kernels run in the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", _with_float_scalars(interpreter._implicit_cvt))
        for name, function in (("rms_norm.rsqrt", _rsqrt), ("layer_norm.rsqrt", _rsqrt), ("geglu.tanh", _tanh)):
            module, _, attribute = name.partition(".")
            patch.setattr(importlib.import_module(f"liger_kernel.ops.{module}"), attribute, function)
        yield


def _with_float_scalars(original: Any) -> Any:
    def convert(argument: Any) -> Any:
        if isinstance(argument, float):  # as a compiled kernel gets it
            return tl.tensor(TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return original(argument)

    return convert
