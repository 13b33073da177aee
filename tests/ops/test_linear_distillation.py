"""linear_distillation against its definition: values, gradients, memory, mutants."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_accel.kernels.linear_distillation import linear_distillation, reference
from automodel_accel.kernels.numerics import judge
from tests.ops.mutation import Mutant, check_caught, mutated

PLAIN: dict[str, Any] = {}
EVERYTHING = {"scale": 0.5, "softcap": 3.0, "teacher_scale": -2.0, "teacher_softcap": 5.0, "temperature": 2.5}
DIFFERENTIATED = ("hidden", "weight", "bias")


def draw(rows: int, vocab: int, seed: int = 0, biased: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden": (rows, 24),
        "weight": (vocab, 24),
        "teacher_hidden": (rows, 40),
        "teacher_weight": (vocab, 40),
        "bias": (vocab,),
        "teacher_bias": (vocab,),
    }
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["counted"] = torch.rand(rows, generator=generator) < 0.7
    return drawn if biased else {name: tensor for name, tensor in drawn.items() if "bias" not in name}


def run(
    operation: Callable[..., torch.Tensor], drawn: dict[str, torch.Tensor], dtype: torch.dtype, **options: Any
) -> Any:
    cast = {name: one if one.dtype == torch.bool else one.to(dtype) for name, one in drawn.items()}
    leaves = [cast[name].requires_grad_() for name in DIFFERENTIATED if name in cast]
    loss = operation(**cast, **options)
    (loss * 0.37).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def excess(
    drawn: dict[str, torch.Tensor],
    dtype: torch.dtype,
    tested: Callable[..., torch.Tensor] = linear_distillation,
    workspace_bytes: int | None = None,
    **options: Any,
) -> float:
    rounded = {name: one if one.dtype == torch.bool else one.to(dtype).double() for name, one in drawn.items()}
    truth = run(reference.linear_distillation, rounded, torch.float64, **options)
    theirs = run(reference.linear_distillation, drawn, dtype, **options)
    ours = run(tested, drawn, dtype, workspace_bytes=workspace_bytes, **options)
    return max(judge(*three).excess for three in zip(ours, theirs, truth, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_definition(dtype: torch.dtype, options: dict[str, Any], biased: bool) -> None:
    drawn = draw(60, 331, biased=biased)
    assert excess(drawn, dtype, **options) <= 1
    assert excess(drawn, dtype, workspace_bytes=20 * 331 * dtype.itemsize, **options) <= 1


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (0, 7), (3, 4097), (33, 2)])
def test_shapes(rows: int, vocab: int) -> None:
    drawn = draw(rows, vocab)
    for name, one in zip(("loss", *DIFFERENTIATED), run(linear_distillation, drawn, torch.float32), strict=True):
        assert one.shape == (() if name == "loss" else drawn[name].shape)
        assert one.isfinite().all()


def test_what_does_not_count_brings_nothing() -> None:
    drawn = draw(9, 50)
    for name in ("hidden", "teacher_hidden"):
        drawn[name][~drawn["counted"]] = float("nan")
    loss, d_hidden, d_weight, d_bias = run(linear_distillation, drawn, torch.float32)
    assert all(one.isfinite().all() for one in (loss, d_hidden, d_weight, d_bias))
    assert d_hidden[~drawn["counted"]].count_nonzero() == 0
    drawn["counted"][:] = False
    assert all(one.count_nonzero() == 0 for one in run(linear_distillation, drawn, torch.float32))


def test_a_student_that_is_its_teacher_learns_nothing() -> None:
    drawn = draw(9, 50)
    drawn |= {f"teacher_{name}": drawn[name].clone() for name in DIFFERENTIATED}
    loss, *gradients = run(linear_distillation, drawn, torch.float64, temperature=2.0)
    assert loss.abs() < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients)


class Largest(TorchDispatchMode):
    """The most elements that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self.elements = max(self.elements, found.numel() if isinstance(found, torch.Tensor) else 0)
        return found


def test_no_more_than_a_chunk_of_logits() -> None:
    drawn = draw(64, 1000)
    with Largest() as largest:
        run(linear_distillation, drawn, torch.float32, workspace_bytes=4 * 1000 * 4)
    assert largest.elements == drawn["teacher_weight"].numel()  # [V, H'], and 4 tokens of logits are fewer


def test_a_frozen_head_gets_no_gradient() -> None:
    drawn = {name: one if one.dtype == torch.bool else one.float() for name, one in draw(9, 50).items()}
    drawn["hidden"].requires_grad_()
    linear_distillation(**drawn).backward()
    assert drawn["hidden"].grad is not None
    assert drawn["weight"].grad is None


def check_everything(tested: ModuleType) -> None:
    tested.CPU_BLOCK_BYTES = 7 * 331 * 4  # chunks of several blocks
    drawn = draw(60, 331)
    drawn["teacher_hidden"][:, :24] = drawn["hidden"]
    found = excess(drawn, torch.float32, tested.linear_distillation, workspace_bytes=20 * 331 * 4, **EVERYTHING)
    assert found <= 1


FILE = "linear_distillation/__init__.py"
MUTANTS = (
    Mutant(FILE, "temperature * student.scale", "student.scale", "no temperature in the gradient"),
    Mutant(FILE, "loss += temperature**2 * torch", "loss += temperature * torch", "one temperature in the loss"),
    Mutant(
        FILE, "in zip((student, teacher), memory", "in zip((student, student), memory", "the student teaches itself"
    ),
    Mutant(FILE, "sub_(p)", "sub_(p * 0.999)", "a teacher of less than 1"),
    Mutant(FILE, "(p * (log_p - log_q))", "(log_q.exp() * (log_p - log_q))", "the divergence the other way round"),
    Mutant(FILE, "1.0 - z * z", "1.0 + z * z", "the wrong slope"),
    Mutant(FILE, "dz.mul_(slope)", "pass", "no slope"),
    Mutant(FILE, "wide_bias += z_CV.sum(0", "wide_bias = z_CV.sum(0", "the bias of the last chunk only"),
    Mutant(
        FILE,
        "d_weight.addmm_(z_CV.t(), hidden_NH[rows])",
        "d_weight.copy_(z_CV.t() @ hidden_NH[rows])",
        "the weight of the last chunk only",
    ),
    Mutant(FILE, "one * grad_output", "one", "no incoming gradient"),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.why)
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    check_caught(mutant, check_everything, tmp_path)


def test_an_unchanged_copy_passes_what_catches_mutants(tmp_path: Path) -> None:
    with mutated(Mutant(FILE, "import torch\n", "import torch\n", "no mistake"), tmp_path) as tested:
        check_everything(tested)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"teacher_weight": torch.zeros(51, 40), "teacher_bias": torch.zeros(51)},
            "vocabulary has 50 classes and the teacher's 51",
        ),
        ({"counted": torch.zeros(8, dtype=torch.bool)}, r"expected \(9,\) torch.bool"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"weight": torch.zeros(50, 25)}, r"expected \[N, H\], \[V, H\]"),
        ({"teacher_bias": torch.zeros(49)}, "teacher_bias"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], said: str) -> None:
    drawn = {name: one if one.dtype == torch.bool else one.float() for name, one in draw(9, 50).items()}
    with pytest.raises(ValueError, match=said):
        linear_distillation(**(drawn | changes))
