"""Launches whose kernels are compiled ahead of time, without a GPU: one list an operation, gathered in `CASES`.

A case is a call of the implementation's own host code on CPU tensors, so that grid, constants, warps and stages are those of a
real launch. `tests/ops/aot.py` records the launch, and compiles it for each target instead of running it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from automodel_accel.kernels import room
from automodel_accel.kernels.fp8_linear.noted import Wish, noting
from automodel_accel.kernels.gated_linear import fused as gated_linear
from automodel_accel.kernels.linear_cross_entropy import fused as linear_cross_entropy
from automodel_accel.kernels.rms_norm import fused as rms_norm

DTYPES = (torch.bfloat16, torch.float32)
HIDDEN = (2048, 4096, 8192)
# of a row held in registers: in float32 the longest one, which is the tightest
ROW_SIZES = (*((torch.bfloat16, hidden) for hidden in HIDDEN), (torch.float32, HIDDEN[-1]))
ROWS = 8
ROOM = 24  # columns: of three adapters of rank 8, no multiple of 16
# what multiplies in a format
TARGETS_OF = {torch.float8_e4m3fn: ("sm_90", "sm_100"), torch.float8_e4m3fnuz: ("gfx942",)}
SUM_NARROW = 1  # access of 2 bytes, by which a sum of partial gradients is written: a program sums few columns


@dataclass(frozen=True, slots=True)
class AotCase:
    """One call of host code, which launches one kernel or more.

    Attributes:
        name: operation/direction/dtype/length of a row/options.
        launch: Makes the tensors and calls the host code.
        programs_per_processor: How many programs must fit on one streaming multiprocessor at once.
        may_spill: Whether registers may spill: rows longer than 8192 do not fit into them.
        single_values: How many accesses of 2 bytes its kernels make, such as one logit of a row.
        targets: Those that it is compiled for; all where empty.
    """

    name: str
    launch: Callable[[], object]
    programs_per_processor: int = 1
    may_spill: bool = False
    single_values: int = 0
    targets: tuple[str, ...] = ()


def with_room(case: AotCase) -> AotCase:
    """The same call, which leaves room beside the rows of its output."""

    def launch() -> None:
        with room.leaving(ROOM):
            case.launch()

    return replace(case, name=f"{case.name}/room {ROOM}", launch=launch)


def with_note(case: AotCase, programs_per_processor: int | None = None) -> list[AotCase]:
    """The same call, which notes the largest values of its output's rows, or their cast, of which fewer programs may fit."""
    wishes = {"maxima noted": (Wish(), ()), **{f"{dtype} noted": (Wish(dtype), on) for dtype, on in TARGETS_OF.items()}}

    def noting_what(wish: Wish) -> Callable[[], None]:
        def launch() -> None:
            with noting(wish):
                case.launch()

        return launch

    return [
        replace(
            case,
            name=f"{case.name}/{what}",
            launch=noting_what(wish),
            targets=targets,
            programs_per_processor=(wish.dtype and programs_per_processor) or case.programs_per_processor,
        )
        for what, (wish, targets) in wishes.items()
    ]


def _rms_norm(dtype: torch.dtype, hidden: int, order: str = "cast_then_mul") -> list[AotCase]:
    x, weight, rstd = torch.ones(ROWS, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype), torch.ones(ROWS)
    name = f"{dtype}/{hidden}/{order}"
    fit = (2 if hidden <= 4096 else 1, hidden > 8192)
    return [
        AotCase(f"rms_norm/forward/{name}", lambda: rms_norm.forward(x, weight, 1e-6, 0.0, order, dtype), *fit),
        AotCase(
            f"rms_norm/backward/{name}",
            lambda: rms_norm.backward(x, x, weight, rstd, 0.0, order, True),
            *(*fit, SUM_NARROW),
        ),
    ]


RMS_NORM = [
    *(case for dtype, hidden in ROW_SIZES for case in _rms_norm(dtype, hidden)),
    *_rms_norm(torch.bfloat16, 4096, "mul_then_cast"),
    *_rms_norm(torch.bfloat16, 16384),
    with_room(_rms_norm(torch.bfloat16, 4096)[0]),
    *(case for hidden in (4096, 8192) for case in with_note(_rms_norm(torch.bfloat16, hidden)[0])),
]


def _gated_linear(dtype: torch.dtype, hidden: int, activation: str = "silu", packed: bool = False) -> list[AotCase]:
    both, grad_both, grad_output = (torch.ones(ROWS, size, dtype=dtype) for size in (2 * hidden, 2 * hidden, hidden))
    gate, up = both.chunk(2, -1) if packed else (grad_output.clone(), grad_output.clone())
    grad_gate, grad_up = grad_both.chunk(2, -1) if packed else (torch.empty_like(gate), torch.empty_like(up))
    name = f"{dtype}/{hidden}/{activation}" + ("/packed" if packed else "")
    return [
        AotCase(f"gated_linear/forward/{name}", lambda: gated_linear.forward(gate, up, activation), 10),
        AotCase(
            f"gated_linear/backward/{name}",
            lambda: gated_linear.backward(grad_output, gate, up, activation, grad_gate, grad_up),
            10,
        ),
    ]


GATED_LINEAR = [
    *(case for dtype in DTYPES for hidden in HIDDEN for case in _gated_linear(dtype, hidden)),
    *(case for dtype in DTYPES for case in _gated_linear(dtype, 8192, packed=True)),
    *(case for activation in ("gelu", "gelu_tanh") for case in _gated_linear(torch.bfloat16, 8192, activation)),
    with_room(_gated_linear(torch.bfloat16, 8192)[0]),
    *(case for hidden in (4096, 8192, 14336) for case in with_note(_gated_linear(torch.bfloat16, hidden)[0], 1)),
]


def _cross_entropy(
    dtype: torch.dtype, vocab: int, softcap: float | None = None, smoothing: float = 0.0, z_loss: float = 0.0
) -> list[AotCase]:
    logits = torch.ones(ROWS, -(-vocab // 16) * 16, dtype=dtype)[:, :vocab]
    target, weight = torch.ones(ROWS, dtype=torch.int64), torch.ones(()).expand(ROWS)
    form = (0.5, softcap, -100, smoothing, z_loss)
    name = f"{dtype}/{vocab}/softcap {softcap}/smoothing {smoothing}" + (f"/z-loss {z_loss}" if z_loss else "")
    fit = (3, False, int(dtype != torch.float32))
    return [
        AotCase(
            f"linear_cross_entropy/forward/{name}", lambda: linear_cross_entropy.forward(logits, target, *form), *fit
        ),
        AotCase(
            f"linear_cross_entropy/backward/{name}",
            lambda: linear_cross_entropy.backward(logits, target, weight, *form),
            *fit,
        ),
    ]


def _shard(
    dtype: torch.dtype, vocab: int, ranks: int, softcap: float | None = None, smoothing: float = 0.0
) -> list[AotCase]:
    columns = -(-vocab // ranks)
    logits = torch.ones(ROWS, -(-columns // 16) * 16, dtype=dtype)[:, :columns]
    target, weight, stats = torch.ones(ROWS, dtype=torch.int64), torch.ones(ROWS), torch.ones(2, ROWS)
    form = (0.5, softcap, -100, smoothing)
    name = f"{dtype}/{vocab} over {ranks}/softcap {softcap}/smoothing {smoothing}"
    fit = (3, False, 2 * int(dtype != torch.float32))
    return [
        AotCase(
            f"linear_cross_entropy/shard forward/{name}",
            lambda: linear_cross_entropy.shard_forward(logits, target, columns, *form),
            *fit,
        ),
        AotCase(
            f"linear_cross_entropy/shard backward/{name}",
            lambda: linear_cross_entropy.shard_backward(logits, target, weight, *stats, columns, vocab, *form),
            *fit,
        ),
    ]


def _scale(dtype: torch.dtype) -> AotCase:
    grad, factor = torch.ones(ROWS, 4096, dtype=dtype), torch.ones(())
    return AotCase(f"linear_cross_entropy/scale/{dtype}", lambda: linear_cross_entropy.scale_(grad, factor), 8)


LINEAR_CROSS_ENTROPY = [
    *(case for dtype in DTYPES for vocab in (128256, 50257) for case in _cross_entropy(dtype, vocab)),
    *(case for dtype in DTYPES for case in _cross_entropy(dtype, 256000, 30.0, 0.1)),
    *(case for dtype in DTYPES for case in _cross_entropy(dtype, 128256, z_loss=1e-4)),
    *(case for dtype in DTYPES for case in _shard(dtype, 128256, 8)),
    *(case for dtype in DTYPES for case in _shard(dtype, 256000, 2, 30.0, 0.1)),
    *map(_scale, DTYPES),
]

from tests.ops.aot_cases_activation import ACTIVATION
from tests.ops.aot_cases_add_rms_norm import ADD_RMS_NORM
from tests.ops.aot_cases_cross_entropy import CROSS_ENTROPY
from tests.ops.aot_cases_experts import EXPERTS_CASES
from tests.ops.aot_cases_fp8 import FP8
from tests.ops.aot_cases_fp8_delayed import FP8_DELAYED
from tests.ops.aot_cases_gated_norm import GATED_NORM
from tests.ops.aot_cases_layer_norm import LAYER_NORM
from tests.ops.aot_cases_lora import LORA
from tests.ops.aot_cases_qk_norm_rope import QK_NORM_ROPE
from tests.ops.aot_cases_rope import ROPE

CASES: dict[str, list[AotCase]] = {
    "activation": ACTIVATION,
    "cross_entropy": CROSS_ENTROPY,
    "experts": EXPERTS_CASES,
    "fp8_delayed": FP8_DELAYED,
    "fp8_linear": FP8,
    "rms_norm": RMS_NORM,
    "add_rms_norm": ADD_RMS_NORM,
    "gated_linear": GATED_LINEAR,
    "gated_norm": GATED_NORM,
    "layer_norm": LAYER_NORM,
    "linear_cross_entropy": LINEAR_CROSS_ENTROPY,
    "lora": LORA,
    "qk_norm_rope": QK_NORM_ROPE,
    "rope": ROPE,
}
