"""Products of 8-bit casts: by the hardware (`torch._scaled_mm`), or emulated: the same values, multiplied in float32."""

import functools

import torch

from automodel_accel.kernels.facts import this_machine

# the beginnings of the names of architectures that multiply 8-bit values; the CPU does too, slower than bfloat16
ARCHS = ("sm_89", "sm_9", "sm_10", "sm_12", "gfx942", "gfx95")
NATIVE, EMULATED = "native", "emulated"


def engine_on(device: str) -> str:
    """What multiplies on a device type of this machine."""
    return NATIVE if device == "cpu" or (device == "cuda" and is_fast(this_machine().arch)) else EMULATED


def is_fast(arch: str) -> bool:
    """Whether that architecture multiplies 8-bit values faster than bfloat16."""
    return arch.startswith(ARCHS)


def product(
    a_MK: torch.Tensor,
    b_PK: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor | None,
    bias_P: torch.Tensor | None,
    dtype: torch.dtype,
    engine: str,
    fast: bool = False,
) -> torch.Tensor:
    """(a * scale_a) (b * scale_b)^T + bias, accumulated in float32 and rounded once to `dtype`: [M, P].

    Args:
        a_MK: 8-bit, contiguous.
        b_PK: 8-bit, contiguous. K and P are multiples of 16 where the hardware multiplies.
        scale_a: Float32 [] or [M, 1].
        scale_b: Float32 [] or [P, 1]; None for ones.
        bias_P: In any floating dtype, or None; it is rounded to `dtype` first, as autocast does.
        dtype: Of the product.
        engine: "native" or "emulated".
        fast: Whether a GPU may accumulate with fewer bits (`use_fast_accum`).
    """
    if engine == EMULATED:
        b = b_PK.float() if scale_b is None else b_PK.float() * scale_b
        wide = (a_MK.float() * scale_a) @ b.t()
        return (wide if bias_P is None else wide + bias_P.to(dtype).float()).to(dtype)
    rowwise = bool(scale_a.dim() or (scale_b is not None and scale_b.dim()))
    if scale_b is None:
        scale_b = _ones(b_PK.shape[0] if rowwise else None, b_PK.device)
    if rowwise:
        scale_a, scale_b = _vector(scale_a, a_MK.shape[0]), _vector(scale_b, b_PK.shape[0])
    out = _out_dtype(dtype, rowwise, a_MK.is_cuda)
    bias = None if bias_P is None or out is not dtype or out is torch.float32 else bias_P.to(out)
    y_MP = torch._scaled_mm(
        a_MK,
        b_PK.t(),
        scale_a=scale_a,
        scale_b=scale_b.t() if rowwise else scale_b,
        bias=bias,
        out_dtype=out,
        use_fast_accum=fast,
    )
    if bias_P is not None and bias is None:
        y_MP = y_MP + bias_P.to(y_MP.dtype)
    return y_MP.to(dtype)


@functools.lru_cache(maxsize=128)
def _ones(rows: int | None, device: torch.device) -> torch.Tensor:
    """Float32 [] or [rows, 1]; of a device and a model there are few, and never written to."""
    with torch.inference_mode(False):
        return torch.ones(() if rows is None else (rows, 1), device=device)


def _vector(scale: torch.Tensor, rows: int) -> torch.Tensor:
    return scale if scale.dim() else scale.expand(rows, 1).contiguous()


def _out_dtype(dtype: torch.dtype, rowwise: bool, on_gpu: bool) -> torch.dtype:
    """A GPU's product with a scale for each row is in bfloat16 alone."""
    return torch.bfloat16 if rowwise and on_gpu else dtype
