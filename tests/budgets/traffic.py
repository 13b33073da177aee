"""Bytes that each operation moves, forward and backward, over its floor: `python -m tests.budgets.traffic` writes JSON lines.

Counted in Triton's interpreter by `watch`, torch operations on the way included. The floor is what must move: every input read
once and every output written once, in the passes that the operation's docstring states; the weights, the statistics of a row and
the partial sums of the programs come on top. A persistent grid has `PROGRAMS` programs of `ROWS / PROGRAMS` rows each: the share
that a program has of 21,120 tokens on the 132 multiprocessors of an H100, two programs on each. With fewer tokens what comes on
top grows in proportion. On a GPU the weights and the partial sums stay in the L2 cache; here they count.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import pytest
import torch

from automodel_accel.kernels import launch
from automodel_accel.kernels.activation import activation
from automodel_accel.kernels.fp8_linear import casts_fused
from automodel_accel.kernels.fp8_linear.noted import Wish, noted
from automodel_accel.kernels.fp8_linear.scaling import formats_here
from automodel_accel.kernels.gated_linear import gated_linear
from automodel_accel.kernels.gated_norm import gated_rms_norm
from automodel_accel.kernels.layer_norm import add_layer_norm, layer_norm
from automodel_accel.kernels.linear_cross_entropy import fused as cross_entropy
from automodel_accel.kernels.rms_norm import add_rms_norm, rms_norm
from automodel_accel.kernels.rope import rope
from tests.budgets.ledger import Figures
from tests.budgets.liger import runnable
from tests.budgets.watch import Watch
from tests.interpreter import repair

PROGRAMS = 4
ROWS, HIDDEN = 320, 2048
FEW_ROWS = 64  # of an operation element by element, which moves the same for each
HEADS, KEY_HEADS, HEAD_DIM, TOKENS = 32, 8, 64, 32  # of Llama-3.2-1B
VOCABULARY, CHUNK = 32000, 4
DTYPE = torch.bfloat16
EPS = 1e-6
MOST = 1.05  # of the floor, that an operation may move

Tensors = tuple[torch.Tensor, ...]
Run = Callable[..., torch.Tensor | Tensors]


@dataclass(frozen=True, slots=True)
class TrafficCase:
    """One operation on one set of inputs.

    Attributes:
        name: Of the operation.
        inputs: Makes its tensors; the floating-point ones get gradients.
        run: The operation, as each implementation has it: name of the implementation -> function of the inputs.
        forward: Bytes of the floor, forward.
        backward: Bytes of the floor, backward.
    """

    name: str
    inputs: Callable[[], Tensors]
    run: dict[str, Run]
    forward: int
    backward: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one implementation moves.

    Attributes:
        moved: Bytes read and written.
        floor: Bytes that must move.
        launches: Names of the kernels, in order.
    """

    operation: str
    implementation: str
    direction: str
    moved: int
    floor: int
    launches: list[str]

    @property
    def ratio(self) -> float:
        """Of the floor, rounded up to three decimals."""
        return math.ceil(self.moved / self.floor * 1000) / 1000


def _rows(rows: int, count: int, parameters: int) -> Callable[[], Tensors]:
    """`count` tensors [rows, HIDDEN], and parameters [HIDDEN]."""

    def make() -> Tensors:
        generator = torch.Generator().manual_seed(0)
        shapes = [(rows, HIDDEN)] * count + [(HIDDEN,)] * parameters
        return tuple(torch.randn(shape, generator=generator).to(DTYPE).requires_grad_() for shape in shapes)

    return make


def _queries_and_keys() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    sizes = (HEADS, KEY_HEADS)
    q, k = (torch.randn(1, TOKENS, size, HEAD_DIM, generator=generator).to(DTYPE).transpose(1, 2) for size in sizes)
    angle = torch.randn(1, TOKENS, HEAD_DIM // 2, generator=generator).repeat(1, 1, 2)
    return q.requires_grad_(), k.requires_grad_(), angle.cos().to(DTYPE), angle.sin().to(DTYPE)


def _of_rows(
    name: str, inputs: int, forward: float, backward: int, ours: Run, liger: Run | None = None, parameters: int = 0
) -> TrafficCase:
    """A case whose floor is so many passes over [N, HIDDEN]; without parameters, no program serves more than one tile."""
    rows = ROWS if parameters else FEW_ROWS
    size = rows * HIDDEN * DTYPE.itemsize
    run = {"ours": ours} | ({"liger": liger} if liger else {})
    return TrafficCase(name, _rows(rows, inputs, parameters), run, int(forward * size), backward * size)


def _rope_floor() -> int:
    """Read and write q and k, read cos and sin."""
    return (2 * TOKENS * (HEADS + KEY_HEADS) * HEAD_DIM + 2 * TOKENS * HEAD_DIM) * DTYPE.itemsize


def _liger(name: str, *options: object) -> Run:
    """One of Liger's autograd functions, imported when it is run."""

    def run(*tensors: torch.Tensor) -> torch.Tensor | Tensors:
        import liger_kernel.ops as ops

        result = getattr(ops, name).apply(*tensors, *options)
        return result[0] if name == "LigerLayerNormFunction" and isinstance(result, tuple) else result

    return run


TRITON = "triton"
MAXIMA, CAST = Wish(), Wish(torch.float8_e4m3fn)  # the latter writes half a pass more
CASES = (
    _of_rows(
        *("rms_norm", 1, 2, 3),
        lambda x, w: rms_norm(x, w, EPS, implementation=TRITON),
        _liger("LigerRMSNormFunction", EPS, 0.0, "llama", False),
        parameters=1,
    ),
    _of_rows(
        *("add_rms_norm", 2, 4, 4),
        lambda x, residual, w: add_rms_norm(x, residual, w, EPS, implementation=TRITON),
        _liger("LigerFusedAddRMSNormFunction", EPS, 0.0, "llama", False),
        parameters=1,
    ),
    _of_rows(
        *("layer_norm", 1, 2, 3),
        lambda x, w, b: layer_norm(x, w, b, EPS, implementation=TRITON),
        _liger("LigerLayerNormFunction", EPS),
        parameters=2,
    ),
    _of_rows(
        *("add_layer_norm", 2, 4, 4),
        lambda x, residual, w, b: add_layer_norm(x, residual, w, b, EPS, implementation=TRITON),
        parameters=2,
    ),
    *(
        _of_rows(
            *(f"gated_rms_norm, gate {'first' if first else 'last'}", 2, 3, 5),
            lambda x, gate, w, first=first: gated_rms_norm(x, gate, w, EPS, gate_first=first, implementation=TRITON),
            parameters=1,
        )
        for first in (False, True)
    ),
    _of_rows(
        *("gated_linear, silu", 2, 3, 5),
        lambda gate, up: gated_linear(gate, up, implementation=TRITON),
        _liger("LigerSiLUMulFunction"),
    ),
    _of_rows(
        *("gated_linear, gelu_tanh", 2, 3, 5),
        lambda gate, up: gated_linear(gate, up, activation="gelu_tanh", implementation=TRITON),
        _liger("LigerGELUMulFunction"),
    ),
    _of_rows(
        *("rms_norm, cast noted", 1, 2.5, 3),
        lambda x, w: noted(CAST, rms_norm, x, w, EPS, implementation=TRITON),
        parameters=1,
    ),
    _of_rows(
        *("add_rms_norm, cast noted", 2, 4.5, 4),
        lambda x, residual, w: noted(CAST, add_rms_norm, x, residual, w, EPS, implementation=TRITON),
        parameters=1,
    ),
    _of_rows(
        *("gated_linear, silu, maxima noted", 2, 3, 5),
        lambda gate, up: noted(MAXIMA, gated_linear, gate, up, implementation=TRITON),
    ),
    _of_rows(
        *("gated_linear, silu, cast noted", 2, 3.5, 5),
        lambda gate, up: noted(CAST, gated_linear, gate, up, implementation=TRITON),
    ),
    _of_rows("activation, relu2", 1, 2, 3, lambda x: activation(x, "relu2", implementation=TRITON)),
    TrafficCase(
        "rope",
        _queries_and_keys,
        {
            "ours": lambda q, k, cos, sin: rope(q, k, cos, sin, implementation=TRITON),
            "liger": _liger("LigerRopeFunction"),
        },
        _rope_floor(),
        _rope_floor(),
    ),
)


@contextmanager
def programs() -> Iterator[None]:
    """Let a persistent grid have `PROGRAMS` programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "INTERPRETED_PROGRAMS", PROGRAMS)
        launch.persistent_programs.cache_clear()
        yield
    launch.persistent_programs.cache_clear()


def measure(case: TrafficCase, implementation: str = "ours") -> list[Traffic]:
    """What the case moves forward and backward, where its inputs and outputs get gradients."""
    inputs = case.inputs()
    with programs(), runnable() if implementation == "liger" else nullcontext():
        with Watch() as forward:
            outputs = case.run[implementation](*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.randn_like(output) for output in outputs]
        with Watch() as backward:
            torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], grads)
    return [
        Traffic(case.name, implementation, direction, watch.moved, floor, [one.name for one in watch.launches])
        for direction, watch, floor in (("forward", forward, case.forward), ("backward", backward, case.backward))
    ]


def measure_cross_entropy() -> list[Traffic]:
    """What the loss's kernel moves for a chunk of logits, in passes over the chunk: the loss alone, and with the gradient."""
    target = torch.arange(CHUNK) * 7
    rows = []
    for direction in ("forward", "backward"):
        logits = torch.randn(CHUNK, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(DTYPE)
        options = (1.0, None, -100, 0.0, 0.0)
        weight = torch.ones(()).expand(CHUNK)
        with Watch() as watch:
            if direction == "forward":
                cross_entropy.forward(logits, target, *options)
            else:
                cross_entropy.backward(logits, target, weight, *options)
        chunk = logits.numel() * DTYPE.itemsize
        names = [one.name for one in watch.launches]
        rows.append(Traffic("cross_entropy of a chunk", "ours", direction, watch.moved, chunk, names))
    return rows


def measure_fp8() -> list[Traffic]:
    """What casts to 8 bits move, of the passes that their docstring states: bytes an element."""
    generator = torch.Generator().manual_seed(0)
    x, amax_R = torch.randn(ROWS, HIDDEN, generator=generator).to(DTYPE), torch.ones(ROWS)
    scale_N, scale_H, dtype = torch.ones(ROWS, 1), torch.ones(HIDDEN, 1), formats_here().e4m3
    both = {"weight_scale": scale_H, "x_scale": scale_N}
    q = x.to(dtype)
    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "one scale": (6, lambda: casts_fused.cast_rows([x], dtype, False, transposed=True)),
        "rows": (3, lambda: casts_fused.cast_rows([x], dtype, True)),
        "rows and transpose": (5, lambda: casts_fused.cast_rows([x], dtype, True, transposed=True)),
        "known rows": (4, lambda: casts_fused.cast_rows([x], dtype, True, transposed=True, amax_R=amax_R)),
        "gradients": (6, lambda: casts_fused.cast_gradients([x], dtype, True, **both)),
        "gradients of the input": (
            3,
            lambda: casts_fused.cast_gradients([x], dtype, True, weight_scale=scale_H, x_scale=None),
        ),
        "transpose": (2, lambda: casts_fused.transposed(q)),
    }
    rows = []
    for name, (passes, run) in runs.items():
        with programs(), Watch() as watch:
            run()
        names = [one.name for one in watch.launches]
        direction = "backward" if name.startswith("gradients") else "forward"
        rows.append(Traffic(f"fp8 cast, {name}", "ours", direction, watch.moved, passes * x.numel(), names))
    return rows


def figures() -> Figures:
    """The ratios of our kernels, for the budget."""
    rows = [row for case in CASES for row in measure(case)] + measure_cross_entropy() + measure_fp8()
    return {f"{row.operation} / {row.direction}": row.ratio for row in rows}


def main() -> None:
    """Write a row for each operation, implementation and direction."""
    repair()
    rows = [row for case in CASES for implementation in case.run for row in measure(case, implementation)]
    about = {"dtype": str(DTYPE).removeprefix("torch."), "rows": ROWS, "hidden": HIDDEN, "programs": PROGRAMS}
    for row in [*rows, *measure_cross_entropy(), *measure_fp8()]:
        sys.stdout.write(json.dumps({**about, **asdict(row), "ratio": row.ratio}) + "\n")


if __name__ == "__main__":
    main()
