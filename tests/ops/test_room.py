"""Room beside the rows of outputs: the values are the same bits, the room is untouched, and only marked tensors have any."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from automodel_accel.kernels import activation as activation_package
from automodel_accel.kernels import gated_linear as gated_package
from automodel_accel.kernels import rms_norm as norm_package
from automodel_accel.kernels import room
from automodel_accel.kernels.recompute import remember, source_of
from automodel_accel.kernels.rms_norm.through import rms_norm_through
from tests.budgets.watch import Watch
from tests.ops.mutation import Mutant, check_caught

COLUMNS = 24
Producer = Callable[..., Any]


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def producers(implementation: str = "triton") -> dict[str, tuple[Producer, int]]:
    """What is left room beside, and how many inputs it takes."""
    named: dict[str, Any] = {"implementation": implementation}
    return {
        "rms_norm": (lambda x: norm_package.rms_norm(x, None, 1e-6, **named), 1),
        "add_rms_norm": (lambda x, r: norm_package.add_rms_norm(x, r, None, 1e-6, **named), 2),
        "rms_norm_through": (lambda x: rms_norm_through(x, None, 1e-6, **named), 1),
        "gated_linear": (lambda gate, up: gated_package.gated_linear(gate, up, **named), 2),
        "activation": (lambda x: activation_package.activation(x, "gelu", **named), 1),
        "activation that saves its output": (lambda x: activation_package.activation(x, "relu", **named), 1),
    }


def outcome(producer: Producer, inputs: list[torch.Tensor], columns: int) -> list[torch.Tensor]:
    """The output, and the gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = first(room.left(columns, producer, *leaves))
    if columns and output.shape[:-1].numel() > 1:  # a single row has no stride that could show it
        assert room.beside(output) >= columns
        assert output.stride(-2) % 16 == 0, "Triton would move 2 bytes at a time"
    else:
        assert room.beside(output) == 0
    grad = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 40), (5, 33), (1, 7), (1, 1), (3, 1030)], ids=str)
@pytest.mark.parametrize("name", producers())
def test_the_same_bits(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    producer, count = producers()[name]
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(count)]
    with_room, without = (outcome(producer, inputs, columns) for columns in (COLUMNS, 0))
    assert all(map(torch.equal, with_room, without))
    if shape[-2] == 1:
        return
    # memory that nobody wrote is filled with NaN in tests
    output = first(room.left(COLUMNS, producer, *inputs))
    assert room.extended(output, room.beside(output))[:, shape[-1] :].isnan().all()


@pytest.mark.parametrize("name", producers())
def test_no_row_at_all(name: str) -> None:
    producer, count = producers()[name]
    assert first(room.left(COLUMNS, producer, *[torch.ones(0, 8)] * count)).shape == (0, 8)


@pytest.mark.parametrize("name", producers())
def test_room_costs_neither_a_launch_nor_a_byte(name: str) -> None:
    producer, count = producers()[name]
    moved = []
    for columns in (COLUMNS, 0):
        with Watch() as watch:
            room.left(columns, producer, *[torch.ones(6, 40)] * count)
        moved.append([(launch.name, launch.moved) for launch in watch.launches])
    assert moved[0] == moved[1]


@pytest.mark.parametrize("name", producers())
def test_written_to_as_without_room(name: str) -> None:
    """In place, by who called the operation: autograd allows and notices what it always did."""
    producer, count = producers()[name]
    found = []
    for columns in (COLUMNS, 0):
        leaves = [torch.linspace(-1, 1, 66).view(2, 33).requires_grad_() for _ in range(count)]
        output = first(room.left(columns, producer, *leaves))
        try:
            output.mul_(2)
            found.append(torch.stack(torch.autograd.grad(output.sum(), leaves)))
        except RuntimeError as error:
            found.append(str(error).partition(" is ")[2])
    assert type(found[0]) is type(found[1])
    assert torch.equal(*found) if isinstance(found[0], torch.Tensor) else found[0] == found[1]


@pytest.mark.parametrize("name", producers())
def test_other_implementations_leave_none(name: str) -> None:
    producer, count = producers("torch")[name]
    output = first(room.left(COLUMNS, producer, *[torch.ones(6, 40)] * count))
    assert output.is_contiguous()
    assert room.beside(output) == 0


def test_what_is_computed_again_has_none() -> None:
    norm, x = producers()["rms_norm"][0], torch.ones(6, 40, requires_grad=True)
    output = room.left(COLUMNS, norm, x)
    remember(output, norm, x)
    source = source_of(output)
    assert source is not None
    again = source.again(source.tensors)
    assert torch.equal(again, output)
    assert again.is_contiguous()
    assert room.beside(again) == 0


def marked() -> torch.Tensor:
    x = torch.zeros(4, 10 + COLUMNS)[:, :10]
    room.mark(x)
    return x


def test_only_a_marked_tensor_has_room() -> None:
    x = marked()
    assert room.beside(x) == COLUMNS
    assert room.beside(torch.zeros(4, 34)[:, :10]) == 0, "a slice of somebody's tensor"
    for other in (x.clone(), x[:, :5], x[1:], x.view(2, 2, 10), x.t(), x.detach(), x * 1):
        assert room.beside(other) == 0
    contiguous = torch.zeros(4, 10)
    room.mark(contiguous)
    assert room.beside(contiguous) == 0


@pytest.mark.parametrize(
    "cut", [lambda x: x[:3], lambda x: x[1:], lambda x: x.expand(4, 4, 10)], ids=["end", "start", "repeated"]
)
def test_a_mark_on_a_part_does_not_count(cut: Any) -> None:
    """Such as attributes that are copied from one tensor to another."""
    part = cut(marked())
    setattr(part, room.MARK, True)
    assert room.beside(part) == 0


def test_writing_beside_is_no_write() -> None:
    x = marked()
    version = x._version
    wide = room.extended(x, 8)
    assert wide.shape == (4, 18)
    wide[:, 10:] = 1
    assert x._version == version
    assert torch.equal(x, torch.zeros(4, 10))


def test_the_room_is_that_of_the_innermost_block() -> None:
    def columns() -> int:
        return room.empty_rows(2, 4, torch.float32, torch.device("cpu")).stride(0) - 4

    with room.leaving(8):
        with room.leaving(16):
            assert columns() == 28
        assert columns() == 12
        with pytest.raises(ZeroDivisionError), room.leaving(24):
            _ = 1 // 0
        assert columns() == 12
    assert columns() == 0


MUTANTS = (
    Mutant(
        "activation/fused.py",
        "Y + row * stride_y + cols",
        "Y + row * n_cols + cols",
        "activation: rows side by side",
    ),
    Mutant("activation/fused.py", "_rows_and_cols(x_NF, y_NF)", "_rows_and_cols(x_NF)", "activation: one long row"),
    Mutant(
        "rms_norm/fused.py", "Y + start * stride_y + cols", "Y + start * n_cols + cols", "rms_norm: rows side by side"
    ),
    Mutant(
        "rms_norm/add_fused.py",
        "Y + start * stride_y + cols",
        "Y + start * n_cols + cols",
        "add_rms_norm: rows side by side",
    ),
    Mutant(
        "gated_linear/fused.py",
        "Y + row * stride_y + cols",
        "Y + row * n_cols + cols",
        "gated_linear: rows side by side",
    ),
    Mutant(
        "gated_linear/fused.py",
        "_rows_and_cols(gate_NF, up_NF, y_NF)",
        "_rows_and_cols(gate_NF, up_NF)",
        "gated_linear: one long row",
    ),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.why)
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    def check(_: ModuleType) -> None:
        for name, (producer, count) in producers().items():
            if name.split("_")[0].split()[0] in mutant.file or "norm" in name:
                inputs = [torch.randn(5, 33) for _ in range(count)]
                assert all(map(torch.equal, outcome(producer, inputs, COLUMNS), outcome(producer, inputs, 0)))

    check_caught(mutant, check, tmp_path)
