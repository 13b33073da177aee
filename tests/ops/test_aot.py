"""Every kernel compiles for every target, without a GPU, and its machine code is as lean as its design says."""

from typing import Any

import pytest

pytest.importorskip("triton")

from tests.budgets import ledger, machine_code
from tests.budgets.groups import GROUPS, MACHINE_CODE, versions
from tests.ops.aot_cases import CASES

REGISTERS = 65536  # of one streaming multiprocessor, in units of 256 for each warp
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 64 * 1024}
# kernel -> sizes that it may multiply in 32 bits: partial sums are a row of each program, and weights of a row lie side by side
PARTIAL_SUMS = ("rms_norm_bwd", "add_rms_norm_bwd", "layer_norm_bwd", "gated_rms_norm_bwd", "sum_partials")
SMALL_PRODUCTS = {
    *((f"{kernel}_kernel", "n_cols") for kernel in PARTIAL_SUMS),
    ("cross_entropy_kernel", "stride_weight"),
    *(
        (f"{kernel}_kernel", "n_cols") for kernel in ("project", "grad_a", "add_grad_input")
    ),  # times a rank: the size of an A
    *(("project_kernel", f"rank{i}") for i in range(3)),  # times the rows of a weight: the size of a B
    ("qk_norm_rope_bwd_kernel", "n_all_tokens"),  # how many tiles there are, each of at least a head
}
WIDEST = {"sm_80": 16, "sm_90": 16, "sm_100": 16, "gfx942": 8}  # twice the lanes share a row there


@pytest.fixture(scope="module", params=CASES)
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """One row for each kernel, case and target of one operation."""
    return machine_code.compiled(request.param)


def test_each_case_launches_a_kernel_on_each_of_its_targets(compiled: list[dict[str, Any]]) -> None:
    found = {(row["case"], row["target"]) for row in compiled}
    operation = compiled[0]["case"].partition("/")[0]
    assert found == {(case.name, target) for case in CASES[operation] for target in case.targets or SHARED}


def test_figures_are_as_committed(compiled: list[dict[str, Any]]) -> None:
    name = MACHINE_CODE + compiled[0]["case"].partition("/")[0]
    committed = ledger.committed(name, versions(GROUPS[name]))
    if committed is None:
        pytest.skip(f"{name}: written with another Triton")
    change = ledger.compare(committed, machine_code.figures(compiled))
    assert not change, f"{name}:\n{change}"


def test_no_offset_is_computed_in_32_bits(compiled: list[dict[str, Any]]) -> None:
    """Products with a size or a stride, past 2^31 elements; but for those that stay small whatever the tensors are."""
    found = {(row["kernel"], product) for row in compiled for product in row["short_products"]}
    assert {product for product in found if product not in SMALL_PRODUCTS} == set()


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if row["spilled"] and not row["may_spill"]] == []


def test_global_memory_is_read_and_written_in_wide_words(compiled: list[dict[str, Any]]) -> None:
    assert [
        row for row in compiled if row["widest"] < WIDEST[row["target"]] or row["narrow"] > row["single_values"]
    ] == []


def test_8_bits_are_rounded_to_by_the_hardware(compiled: list[dict[str, Any]]) -> None:
    """To a bf16 or a float32 alone nothing is rounded so; the casts to 8 bits, and producers that note one, know no other way."""
    for row in compiled:
        expected = set()
        noted = "float8" in row["case"] and row["case"].endswith("noted")
        if noted or row["kernel"] in ("cast_rows_kernel", "cast_tiles_kernel", "delayed_cast_kernel"):
            wide, fnuz = "e5m2" in row["case"], row["target"].startswith("gfx")
            fnuz_cast, cast = ("bf8", "e5m2") if wide else ("fp8", "e4m3")
            expected = {f"v_cvt_pk_{fnuz_cast}_f32" if fnuz else f"cvt.rn.satfinite.{cast}x2.f32"}
        assert set(row["eight_bit_casts"]) == expected


def test_a_program_has_at_most_1024_threads(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if row["threads"] > 1024] == []


def test_the_programs_meant_to_run_side_by_side_fit_on_a_multiprocessor(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        by_memory = SHARED[row["target"]] // (row["shared"] + 1024)  # the system keeps 1 KiB of each program's
        by_registers = REGISTERS // (row["threads"] * -(-row["registers"] // 8) * 8)
        fit = by_memory if row["target"].startswith("gfx") else min(by_memory, by_registers)
        assert fit >= row["programs_per_processor"], row
