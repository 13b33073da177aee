"""The figures are as committed, and within the bounds that the design sets; a kernel that wastes is caught."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here", allow_module_level=True)

from tests.budgets import layers, ledger, traffic
from tests.budgets.groups import GROUPS, LORA, MACHINE_CODE, versions
from tests.ops.mutation import Mutant, mutated

MOST_LAUNCHES = 34  # of a Llama layer, forward and backward
MOST_SAVED = 100_000  # bytes per token of a layer of Llama-3-8B, with selective recompute
MOST_PASSES = 3.01  # over a chunk of logits: three, and one logit, label and loss of each row
SLOW = {"bytes moved, of the floor", "launches of a layer"}
INTERPRETED = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in GROUPS
    if not name.startswith(MACHINE_CODE)
]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_left_alone(uninitialised_memory_is_nan: None) -> Iterator[None]:
    """Filling it with NaN would count as launches and bytes."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before, warn_only=True)


@pytest.mark.parametrize("name", INTERPRETED)
def test_figures_are_as_committed(name: str) -> None:
    group = GROUPS[name]
    committed = ledger.committed(name, versions(group))
    if committed is None:
        pytest.skip(f"{name}: written with other versions than {versions(group)}")
    change = ledger.compare(committed, group.measure())
    assert not change, f"{name}:\n{change}"


def test_committed_figures_are_within_the_bounds() -> None:
    """What `test_figures_are_as_committed` has found to be so."""
    groups = {name: group["figures"] for name, group in ledger.read()["groups"].items()}
    assert groups["launches of a layer"]["llama / all"] <= MOST_LAUNCHES
    saved = groups["saved bytes of a layer, per token"]
    assert max(saved["Llama-3-8B / selective"], saved[f"{LORA} / selective"]) <= MOST_SAVED
    moved = groups["bytes moved, of the floor"]
    passes = {"cross_entropy of a chunk / forward": 1.01, "cross_entropy of a chunk / backward": MOST_PASSES}
    assert {name for name, ratio in moved.items() if ratio > passes.get(name, traffic.MOST)} == set()


WASTE = (
    Mutant(
        "rms_norm/fused.py",
        "        normed = x * rstd\n",
        "        normed = tl.load(X + start * stride_x + cols, mask=in_row, other=0.0).to(tl.float32) * rstd\n",
        "loads x twice",
    ),
    Mutant(
        "rms_norm/fused.py",
        "cols, dx.to(DX.dtype.element_ty), mask=in_row)",
        "cols, dx.to(DX.dtype.element_ty), mask=in_row)\n"
        "        tl.store(DX + start * n_cols + cols, dx.to(DX.dtype.element_ty), mask=in_row)",
        "stores dx twice",
    ),
    Mutant(
        "gated_linear/fused.py",
        "    dgate = dy * up * slope\n",
        "    dgate = dy * tl.load(UP + row * stride_up + cols, mask=in_row, other=0.0).to(tl.float32) * slope\n",
        "loads up twice",
    ),
    Mutant("rms_norm/fused.py", "x_NH.new_empty(", "x_NH.new_zeros(", "a launch that only clears"),
)


@pytest.mark.parametrize("mutant", WASTE, ids=lambda mutant: mutant.why)
def test_a_kernel_that_wastes_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    operation = mutant.file.partition("/")[0]
    case = next(case for case in traffic.CASES if case.name.startswith(operation))
    committed = ledger.read()["groups"]["bytes moved, of the floor"]["figures"]
    with mutated(mutant, tmp_path):
        found = {f"{row.operation} / {row.direction}": row.ratio for row in traffic.measure(case)}
    change = ledger.compare({name: committed[name] for name in found}, found)
    assert list(change.worse) == [f"{case.name} / backward"]
    assert not change.stale


@pytest.mark.parametrize("worse", [1.2, {"registers": 41, "widest": 16}, {"registers": 40, "widest": 8}])
def test_what_gets_worse_is_not_written_without_a_reason(worse: ledger.Figure, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    good: ledger.Figure = {"registers": 40, "widest": 16} if isinstance(worse, dict) else 1.1
    ledger.write("group", {"figure": good}, {"torch": "1"}, path=path)
    written = path.read_text()
    with pytest.raises(ledger.WorseFigures, match=r"figure: .* -> "):
        ledger.write("group", {"figure": worse}, {"torch": "1"}, path=path)
    assert path.read_text() == written
    ledger.write("group", {"figure": worse}, {"torch": "1"}, "a trade", path)
    assert ledger.read(path)["groups"]["group"]["figures"] == {"figure": worse}
    assert list(ledger.read(path)["reasons"].values()) == ["a trade"]


def test_a_stale_file_differs() -> None:
    change = ledger.compare({"better": 2.0, "gone": 1.0, "same": 1.0}, {"better": 1.0, "new": 1.0, "same": 1.0})
    assert not change.worse
    assert sorted(change.stale) == ["better", "gone", "new"]


def test_figures_of_other_versions_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    ledger.write("group", {"figure": 1.0}, {"torch": "1"}, path=path)
    assert ledger.committed("group", {"torch": "1"}, path) == {"figure": 1.0}
    assert ledger.committed("group", {"torch": "2"}, path) is None


def test_a_vanilla_layer_is_counted_as_known() -> None:
    """Counted by hand in transformers' LlamaDecoderLayer: what the counting itself must get right."""
    counts = layers.launches(layers.vanilla)
    assert counts["forward"]["mm"] == 7
    assert counts["backward"]["mm"] == 14
    assert counts["forward"]["rsqrt"] == 2
    assert counts["forward"]["silu"] == 1
