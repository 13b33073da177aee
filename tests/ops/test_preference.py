"""The measured table that "auto" goes by: what a row decides, what the bench's rows become, and the table that is shipped."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from automodel_accel.kernels import preference
from automodel_accel.kernels.contract import Implementation, Kernel, Spec, choose
from automodel_accel.kernels.preference import TABLE, order, size_class, table, write_preferences
from tests.ops.test_contract import CPU, H100, machine

ALL = frozenset({torch.bfloat16, torch.float32})
KERNEL = Kernel(
    name="norm",
    reference=torch.relu,
    implementations=tuple(
        Implementation(
            name=name,
            module="math",
            devices=frozenset({"cuda"}),
            dtypes=ALL | {torch.float64} if name == "torch" else ALL,
            features=features,
        )
        for name, features in (
            ("triton", frozenset({"bias"})),
            ("torch", frozenset({"bias"})),
            ("liger", frozenset()),
        )
    ),
)
ROW = Spec("cuda", torch.bfloat16, 4096)


def measured(variant: str, seconds: float, **changes: Any) -> Mapping[str, Any]:
    """A row of the bench."""
    row = {
        "case": "norm",
        "variant": variant,
        "sizes": {"tokens": 8192, "hidden": 4096},
        "dtype": "bfloat16",
        "device_name": "NVIDIA H100",
        "arch": "sm_90",
        "seconds": {"p20": seconds * 0.9, "p50": seconds},
        "commit": "abc",
        "dirty": False,
        "time": "2026-01-01T00:00:00",
    }
    return {**row, **changes}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of its own."""
    made = tmp_path / "preference.json"
    monkeypatch.setattr(preference, "TABLE", made)
    return made


def test_the_fastest_measured_one_is_taken_and_the_reason_names_the_device(path: Path) -> None:
    write_preferences([measured("triton", 1.0), measured("torch", 3.0), measured("liger", 0.8)], path)
    choice = choose(KERNEL, H100, ROW)
    assert choice.winner is KERNEL.implementations[2]
    assert choice.why == "fastest measured on NVIDIA H100: 0.80 x the time of triton"
    assert [other.name for other in choice.others] == ["triton", "torch"]
    assert choice.refused == ()


def test_another_architecture_size_or_dtype_was_not_measured(path: Path) -> None:
    write_preferences([measured("triton", 1.0), measured("liger", 0.5)], path)
    for facts, spec in (
        (H100, Spec("cuda", torch.bfloat16, 4097)),
        (H100, Spec("cuda", torch.bfloat16, 2048)),
        (H100, Spec("cuda", torch.float32, 4096)),
        (_with_arch("sm_80"), ROW),
    ):
        choice = choose(KERNEL, facts, spec)
        assert choice.winner is KERNEL.implementations[0]
        assert choice.why == f"first in order, as this was not measured on {facts.arch}"
    assert choose(KERNEL, H100, Spec("cuda", torch.bfloat16, 2049)).winner is KERNEL.implementations[2]


def test_one_that_cannot_serve_the_call_is_not_taken_however_fast(path: Path) -> None:
    write_preferences([measured("triton", 1.0), measured("torch", 3.0), measured("liger", 0.5)], path)
    choice = choose(KERNEL, H100, Spec("cuda", torch.bfloat16, 4096, frozenset({"bias"})))
    assert choice.winner is KERNEL.implementations[0]
    assert choice.why == "fastest measured on NVIDIA H100: 0.33 x the time of torch"
    assert [str(no) for no in choice.refused] == ["norm: liger: does not do bias"]


def test_features_have_rows_of_their_own(path: Path) -> None:
    rows = [measured("triton", 1.0), measured("torch", 3.0)]
    with_bias = [measured("triton", 1.0, features=["bias"]), measured("torch", 0.7, features=["bias"])]
    write_preferences(rows + with_bias, path)
    assert choose(KERNEL, H100, ROW).winner is KERNEL.implementations[0]
    biased = choose(KERNEL, H100, Spec("cuda", torch.bfloat16, 4096, frozenset({"bias"})))
    assert biased.winner is KERNEL.implementations[1]


def test_a_row_that_did_not_measure_the_first_in_order_displaces_nothing(path: Path) -> None:
    write_preferences([measured("torch", 3.0), measured("liger", 0.5)], path)
    assert choose(KERNEL, H100, ROW).winner is KERNEL.implementations[0]


def test_reasons_without_a_measurement(path: Path) -> None:
    write_preferences([], path)
    assert choose(KERNEL, H100, Spec("cuda", torch.float64, 64)).why == "the only one that serves float64 here"
    assert choose(KERNEL, H100, ROW, "torch").why == "named by you"
    assert choose(KERNEL, CPU, Spec("cpu", torch.float32, 64)).why == ""


def test_a_named_one_is_taken_whatever_the_table_says(path: Path) -> None:
    write_preferences([measured("triton", 1.0), measured("liger", 0.5)], path)
    choice = choose(KERNEL, H100, ROW, "triton")
    assert (choice.winner, choice.others) == (KERNEL.implementations[0], ())


def test_sizes_of_one_class_are_added_up_where_all_were_measured(path: Path) -> None:
    other = {"tokens": 512, "hidden": 3072}
    rows = [measured("triton", 1.0), measured("liger", 0.9), measured("torch", 0.1)]
    rows += [measured("triton", 0.5, sizes=other), measured("liger", 0.8, sizes=other)]
    (found,) = write_preferences(rows, path)
    assert dict(found.seconds) == {"triton": 1.5, "liger": pytest.approx(1.7)}
    assert (found.size_class, found.device_name, found.commit) == (4096, "NVIDIA H100", "abc")


def test_the_newest_measurement_counts_and_other_keys_stay(path: Path) -> None:
    write_preferences([measured("triton", 1.0), measured("triton", 2.0, dtype="float32")], path)
    later = "2026-02-01T00:00:00"
    rows = [measured("triton", 5.0, time=later, commit="def", dirty=True), measured("triton", 9.0)]
    (found,) = write_preferences(rows, path)
    assert (dict(found.seconds), found.commit) == ({"triton": 5.0}, "def with changes")
    assert len(table(path)) == 2
    assert order("norm", H100, torch.float32, 4096, frozenset(), ["triton", "torch"])[0] == ["triton", "torch"]


def test_what_a_row_says_of_itself_counts_and_a_library_of_its_own_does_not(path: Path) -> None:
    rows = [
        measured("ours", 1.0, case="norms", operation="norm", implementation="triton", size=100),
        measured("liger", 0.1, case="norms", operation="norm", implementation=None, size=100),
    ]
    (found,) = write_preferences(rows, path)
    assert (found.operation, found.size_class, dict(found.seconds)) == ("norm", 128, {"triton": 1.0})
    with pytest.raises(ValueError, match="none of its sizes"):
        write_preferences([measured("triton", 1.0, sizes={"tokens": 3})], path)


def test_two_rows_for_one_key_are_an_error(path: Path) -> None:
    write_preferences([measured("triton", 1.0)], path)
    path.write_text(json.dumps(json.loads(path.read_text()) * 2))
    table.cache_clear()
    with pytest.raises(ValueError, match="two rows for one key"):
        table(path)


@pytest.mark.parametrize(("size", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192)])
def test_size_classes(size: int, expected: int) -> None:
    assert size_class(size) == expected


def test_the_shipped_table_is_whole() -> None:
    for row in table(TABLE).values():
        assert row.commit
        assert row.device_name
        assert all(seconds > 0 for seconds in row.seconds.values())


def _with_arch(arch: str) -> Any:
    return dataclasses.replace(machine("cuda", {"triton": "1"}), arch=arch)
