"""Make Triton's interpreter honest about bfloat16, so that kernels can be tested without a GPU.

The interpreter keeps bfloat16 as uint16. As shipped (3.6 to 3.9) it truncates where the hardware rounds to nearest even, and does
arithmetic, comparison and `tl.dot` on the bit patterns. Here each operation on bfloat16 widens to float32 and rounds once.
Reductions of raw bfloat16 raise instead: their result would depend on an order that the hardware does not promise.

It keeps 8-bit formats as uint8, and its cast of float32 to one of them, as shipped, rounds ties away from zero, cuts subnormals off
and wraps past the largest value. Here it rounds to nearest even; NaN stays. What is past the largest value becomes that in the
formats of NVIDIA (`cvt.rn.satfinite`), and NaN in those of gfx942 (`v_cvt_pk_fp8_f32` in the mode that is the default).
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# their last operand has the dtype of the result
ARITHMETIC = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf", "create_dot")
QUIET_NAN = np.uint16(0x7FC0)
EIGHT_BITS = {  # format -> bits of mantissa, least exponent, code of NaN; largest finite value
    tl.float8e4nv: (3, -6, 0x7F, 448.0),
    tl.float8e5: (2, -14, 0x7F, 57344.0),
    tl.float8e4b8: (3, -7, 0x80, 240.0),
    tl.float8e5b16: (2, -15, 0x80, 57344.0),
}
ONE_ZERO = (tl.float8e4b8, tl.float8e5b16)  # the code of -0.0 is NaN's


def repair() -> None:
    """Replace the interpreter's operations on bfloat16, for this process; silence overflow and NaN, as a GPU does."""
    np.seterr(all="ignore")
    interpreter._patch_lang_tensor = _scalar_index(interpreter._patch_lang_tensor)
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(_narrow(np.array([value], np.float32)), tl.bfloat16)
    InterpreterBuilder.create_fp_to_fp = _to_eight_bits(InterpreterBuilder.create_fp_to_fp)
    for name in ARITHMETIC:
        setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name)))
    for reduction in (interpreter.ReduceOps, interpreter.ScanOps):
        reduction.apply_impl = _refuse_bf16(reduction.apply_impl)


def _scalar_index(original: Callable[..., None]) -> Callable[..., None]:
    """Let a scalar be the bound of a loop: triton 3.6 converts an array of one element, which numpy >= 2.4 refuses."""

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest and ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half_less_tie = np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    rounded = ((bits + half_less_tie) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), QUIET_NAN, rounded).reshape(np.shape(values))


def _is_bf16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        to_bf16 = dtype.scalar == tl.bfloat16
        if _is_bf16(source) and not to_bf16:
            return original(self, TensorHandle(_widen(source.data), tl.float32), dtype)
        if to_bf16 and not _is_bf16(source):
            return TensorHandle(_narrow(source.data.astype(np.float32)), tl.bfloat16)
        return original(self, source, dtype)

    return cast_impl


def _to_eight_bits(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_fp_to_fp(self: Any, source: Any, dtype: Any, rounding_mode: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dtype.scalar not in EIGHT_BITS:
            return original(self, source, dtype, rounding_mode)
        return TensorHandle(_rounded_to_eight_bits(source.data, dtype.scalar), dtype.scalar)

    return create_fp_to_fp


def _rounded_to_eight_bits(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Codes of the nearest values, ties to even: a value is a whole number of the units of its exponent."""
    mantissa_bits, least, nan, most = EIGHT_BITS[dtype]
    wide = np.minimum(np.abs(values.astype(np.float64)), 2 * most if dtype in ONE_ZERO else most)
    exponent = np.frexp(np.maximum(wide, 2.0**least))[1] - 1
    units = np.rint(
        np.ldexp(wide, mantissa_bits - exponent)
    )  # from 2^bits on if normal: one more carries into the exponent
    codes = np.where(np.isnan(values), 0x80, units + ((exponent - least) << mantissa_bits)).astype(np.uint8)
    negative = np.signbit(values) & ((codes > 0) | (dtype not in ONE_ZERO))
    return np.where(codes > 0x7F, np.uint8(nan), codes | (negative.astype(np.uint8) << np.uint8(7)))


def _in_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def operation(self: Any, *arguments: Any) -> Any:
        if not any(map(_is_bf16, arguments)) or np.where in arguments:  # a selection moves bits and computes nothing
            return original(self, *arguments)
        result_is_bf16 = _is_bf16([value for value in arguments if isinstance(value, TensorHandle)][-1])
        wide = [TensorHandle(_widen(value.data), tl.float32) if _is_bf16(value) else value for value in arguments]
        result = original(self, *wide)
        if result.data.dtype == np.bool_:
            return TensorHandle(result.data, tl.int1)
        return TensorHandle(_narrow(result.data), tl.bfloat16) if result_is_bf16 else result

    return operation


def _refuse_bf16(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply_impl(self: Any, inputs: tuple[Any, ...]) -> Any:
        if any(_is_bf16(value.handle) for value in inputs):
            raise TypeError("a reduction of raw bfloat16: convert to float32 first")
        return original(self, inputs)

    return apply_impl
