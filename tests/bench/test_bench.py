"""The benchmarks run, say what they measured, and stay silent where the operation's tests are red."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command_line
from bench import compare
from bench.linear_cross_entropy import CASE

GREEN = ("tests/ops/test_linear_cross_entropy.py", "-k", "test_scale")
RED = ("tests/ops/test_linear_cross_entropy.py", "-k", "no test has this name")
QUICK = ["linear_cross_entropy", "--quick", "--repetitions", "1", "--ignored", "0.5"]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows go to a folder of the test, and the operation's tests are one that takes a second."""
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(command_line, "CASES", {CASE.name: replace(CASE, tests=GREEN)})
    return tmp_path / "linear_cross_entropy.jsonl"


def test_quick_run(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(QUICK) == 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["vanilla", "ours"]
    for row in rows:
        assert row["sizes"] == {**CASE.quick, "ignored": 0.5}
        assert row["flops"] == 6 * 128 * 64 * 8192
        assert row["bytes_floor"] == 3 * (8192 + 256) * 64 * 4
        assert 0 < row["seconds"]["min"] <= row["seconds"]["p20"] <= row["seconds"]["p50"] <= row["seconds"]["max"]
        assert row["cpu_seconds"]["min"] > 0
        assert (row["case"], row["dtype"], row["threads"]) == ("linear_cross_entropy", "float32", 1)
        assert {"python", "torch"} <= row["versions"].keys()
        assert {"device", "device_name", "arch", "commit", "dirty", "time"} <= row.keys()
        assert str(Path.home()) not in json.dumps(row)
    # half of 256 x 8192 logits and the weight's gradient, against three times all logits
    vanilla, ours = (row["extra_peak_bytes"] for row in rows)
    assert 2 * 2**20 <= ours < vanilla / 2
    printed = capsys.readouterr().out
    assert "vanilla" in printed
    assert "2 rows appended to bench/results/linear_cross_entropy.jsonl" in printed


def test_no_speed_where_tests_are_red(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "CASES", {CASE.name: replace(CASE, tests=RED)})
    assert command_line.main(QUICK) == 1
    assert not results.exists()
    printed = capsys.readouterr().out
    assert "its tests are red, so no speed is measured" in printed
    assert "vanilla" not in printed


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    assert "python -m bench linear_cross_entropy --tokens 8192" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["linear_cros"], [*QUICK, "--repetitions", "0"], [*QUICK, "--dtype", "int8"]])
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_line.main(arguments)
    assert "error:" in capsys.readouterr().err


def test_a_variant_that_fails_names_itself(results: Path) -> None:
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: ours failed at \{'tokens': 4.*\n"):
        list(compare.compare(replace(CASE, variants={"ours": CASE.variants["ours"]}), {"tokens": 4}, "float32", 1, 1))
