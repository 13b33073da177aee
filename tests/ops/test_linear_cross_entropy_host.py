"""linear_cross_entropy: what the host does (registration, chunks, refusals), and mistakes that must be caught."""

from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import library

from automodel_accel.kernels import linear_cross_entropy as package
from tests.ops import checks
from tests.ops.allocations import Allocations
from tests.ops.checks_linear_cross_entropy import IGNORED, IMPLEMENTATIONS, VOCAB, Options, check_package, operation
from tests.ops.mutants_linear_cross_entropy import MUTANTS
from tests.ops.mutation import Mutant, check_caught, mutated


@pytest.mark.parametrize("grad", [True, False])
def test_only_losses_where_nothing_needs_a_gradient(grad: bool) -> None:
    one = operation("torch")
    hidden, *others = one.draw((9, 16), torch.float32)
    assert hidden is not None
    with torch.set_grad_enabled(grad), Allocations() as allocations:
        loss = one.ours(hidden.requires_grad_(not grad), *others)
    assert not loss.requires_grad
    assert [name for name in allocations.operations if "mm" in name] == ["aten.addmm.out"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"bias": False, "num_items": 3}], ids=["mean", "none", "num_items"]
)
def test_compiled(implementation: str, options: Options) -> None:
    checks.check_compiled(operation(implementation, **options))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", package.REDUCTIONS)
@pytest.mark.parametrize(
    "needs", [[True, True, True, False, False], [True] * 5, [False, False, False, True, True], [False] * 5], ids=str
)
def test_registered(implementation: str, reduction: str, needs: list[bool]) -> None:
    hidden, weight, bias, target, *low_rank = operation(implementation, rank=2 * any(needs[3:])).draw(
        (5, 16), torch.float32
    )
    floats = [x for x in (hidden, weight, bias, *low_rank) if x is not None]
    inputs = [*(x.requires_grad_(need) for x, need in zip(floats, needs)), *([None] * (5 - len(floats)))]
    options = (1.5, 3.0, IGNORED, 0.1, 0.05, reduction, None, None, implementation, needs)
    library.opcheck(torch.ops.automodel_accel.linear_cross_entropy.default, (*inputs, target, None, *options))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_functorch_is_right_or_refused(implementation: str) -> None:
    checks.check_functorch(operation(implementation, ignored=0.0, reduction="none"))


@pytest.mark.parametrize(
    ("tokens", "vocab", "dtype", "workspace", "device", "expected"),
    [
        (4096, 128256, torch.bfloat16, None, "meta", 1024),  # 256 MiB hold 1046
        (4097, 128256, torch.bfloat16, None, "meta", 1025),  # evenly, no chunk of a few rows
        (8192, 256000, torch.bfloat16, None, "meta", 1024),  # never shorter on a GPU
        (65536, 1000, torch.bfloat16, None, "meta", 4096),
        (2**18, 128256, torch.bfloat16, None, "meta", 8192),  # 32 chunks in a 16-bit dtype
        (2**18, 128256, torch.float32, None, "meta", 1024),
        (4096, 128256, torch.float32, None, "cpu", 256),  # 128 MiB hold 261
        (10, 128256, torch.float32, None, "cpu", 10),
        (10, 100, torch.float32, 1200, "cpu", 3),
        (10, 100, torch.float32, 1, "meta", 1),
        (0, 100, torch.float32, None, "cpu", 1),
    ],
)
def test_length_of_chunks(
    tokens: int, vocab: int, dtype: torch.dtype, workspace: int | None, device: str, expected: int
) -> None:
    assert package.chunks.chunk_rows(tokens, vocab, torch.empty(0, dtype=dtype, device=device), workspace) == expected


def test_a_bound_that_is_too_low_is_never_silent() -> None:
    hidden, weight, target = torch.ones(5, 16), torch.ones(7, 16), torch.arange(5)
    with pytest.raises(ValueError, match="5 targets count, but valid_rows promises at most 4"):
        package.linear_cross_entropy(hidden, weight, target, valid_rows=4)
    for bound, lost in ((4, True), (5, False)):  # on a GPU
        options = package.chunks.Options(1.0, None, IGNORED, 0.0, 0.0, "mean", bound, None, "torch", [True] * 5)
        assert package.chunks.divisor(target, None, options, torch.float32).isnan().item() == lost


WRONG: tuple[tuple[Options, str], ...] = (
    ({"hidden": torch.ones(2, 3, 8)}, r"hidden is \(2, 3, 8\) torch.float32 on cpu, expected \[N, H\]; flatten"),
    ({"weight": torch.ones(7, 9)}, r"weight is \(7, 9\) .*, expected \(V, 8\) torch.float32 on cpu"),
    ({"weight": torch.ones(7, 8).bfloat16()}, r"weight is .* torch.bfloat16 .*, expected \(V, 8\) torch.float32"),
    ({"bias": torch.ones(8)}, r"bias is \(8,\) .*, expected \(7,\)"),
    ({"target": torch.ones(4, dtype=torch.int64)}, r"target is \(4,\) torch.int64 .*, expected \(3,\) torch.int64"),
    ({"target": torch.ones(3, dtype=torch.int32)}, r"target is .* torch.int32 .*, expected \(3,\) torch.int64"),
    ({"target": torch.tensor([1, 7, 2])}, "target 7 is no class; expected 0 to 6, or ignore_index=-100"),
    ({"target": torch.tensor([1, -1, 2])}, "target -1 is no class"),
    ({"reduction": "avg"}, "reduction 'avg' is unknown"),
    ({"softcap": 0.0}, "softcap is 0.0, expected a positive number"),
    ({"label_smoothing": 1.5}, "label_smoothing is 1.5, expected a share"),
    ({"z_loss": -0.1}, "z_loss is -0.1, expected a factor of at least 0"),
    ({"num_items": 3, "reduction": "sum"}, "num_items divides a mean, but reduction is 'sum'"),
    ({"num_items": 0}, "num_items is 0, expected a positive number"),
    ({"num_items": torch.ones(2)}, r"num_items has shape \(2,\), expected a number or a 0-d tensor"),
    ({"valid_rows": -1}, "valid_rows is -1"),
    ({"workspace_bytes": 0}, "workspace_bytes is 0, expected at least 1"),
    ({"implementation": "tritn"}, "Did you mean 'triton'"),
)


@pytest.mark.skipif(checks.DEVICE != "cpu", reason="a GPU does not wait for the host, and the tensors are on the CPU")
@pytest.mark.parametrize(("change", "sentence"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_refused_with_a_sentence(change: Options, sentence: str) -> None:
    arguments: Options = {
        "hidden": torch.ones(3, 8),
        "weight": torch.ones(7, 8),
        "target": torch.tensor([0, IGNORED, 6]),
    }
    package.linear_cross_entropy(**arguments)
    with pytest.raises(ValueError, match=sentence):
        package.linear_cross_entropy(**{**arguments, **change})


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    hidden, weight, bias, target = operation("triton").draw((64, 32), torch.bfloat16)
    options: Options = {"valid_rows": 64, "num_items": torch.tensor(7, device="cuda"), "workspace_bytes": 4 * VOCAB * 2}
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    one = operation("triton", **options)
    one.ours(*leaves, target).backward()  # type: ignore[no-untyped-call]  # loads and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.ours(*leaves, target).backward()  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.why}")
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path) -> None:
    check_caught(mutant, partial(check_file, mutant.file, tmp_path), tmp_path)


def check_file(file: str, folder: Path, tested: ModuleType) -> None:
    """What catches mutants; for a part of the host code, on host code that is loaded again, and so imports that part anew."""
    if file.endswith("chunks.py"):
        with mutated(
            Mutant("linear_cross_entropy/__init__.py", "import torch\n", "import torch\n", "none"), folder
        ) as anew:
            check_package("torch", anew)
    else:
        check_package("triton" if file.endswith("fused.py") else "torch", tested)


@pytest.mark.parametrize("file", ["fused.py", "eager.py", "chunks.py", "__init__.py"])
def test_an_unchanged_copy_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    copy = Mutant(f"linear_cross_entropy/{file}", "import torch\n", "import torch\n", "no mistake")
    with mutated(copy, tmp_path) as tested:
        check_file(file, tmp_path, tested)
