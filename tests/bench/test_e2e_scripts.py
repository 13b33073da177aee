"""bench/h100.sh: what it would run, what it skips, and the table that it leaves."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.e2e.summary import read, summary

ROOT = Path(__file__).resolve().parents[2]


def h100(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "bench/h100.sh", "--python", sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_dry_run_prints_every_part_within_the_time(tmp_path: Path) -> None:
    done = h100("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert all(line.startswith("timeout ") for line in lines)
    parts = (
        "-m pytest -m gpu",
        " kernels --op linear",
        " kernels --op lora",
        " kernels --op fp8",
        "-m bench e2e",
        "-m bench.e2e.summary",
    )
    limits = [next(int(line.split()[1]) for line in lines if part in line) for part in parts]
    assert sum(limits) <= 9 * 60
    assert "Llama-3-8B --rows 2 --repetitions 1 --methods lora" in done.stdout
    assert not list(tmp_path.iterdir())


def test_one_part_alone_has_all_the_time(tmp_path: Path) -> None:
    done = h100("e2e", "--dry-run", "--minutes", "5", "--out", str(tmp_path))
    limits = {int(line.split()[1]) for line in done.stdout.splitlines()}
    assert 270 < min(limits) <= max(limits) <= 285


def test_parts_that_are_done_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "done").write_text("tests\nkernels\n")
    done = h100("all", "--dry-run", "--out", str(tmp_path))
    assert "tests: done before" in done.stdout
    assert "-m pytest" not in done.stdout
    assert "kernels: done before" in done.stdout
    assert " kernels --op linear" not in done.stdout
    assert " kernels --op lora_layer,lora --models Llama-3-8B,Llama-3.2-1B --tokens 8192" in done.stdout
    assert "-m bench e2e" in done.stdout


@pytest.mark.parametrize("wrong", [["kernel"], ["--minutes", "0"], ["--wheels", "no such folder"], ["--out"]])
def test_bad_arguments_are_refused(wrong: list[str]) -> None:
    done = h100("--dry-run", *wrong)
    assert done.returncode == 2
    assert "see bench/h100.sh --help" in done.stderr


def test_a_wheel_that_does_not_install_is_said_and_stops_nothing(tmp_path: Path) -> None:
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    (wheels / "broken-1.0-py3-none-any.whl").write_text("no archive")
    done = h100("table", "--wheels", str(wheels), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not installed: broken-1.0-py3-none-any:" in done.stdout
    assert (out / "summary.md").read_text() == "No rows.\n"
    assert (out / "done").read_text() == "table\n"


ABOUT: dict[str, Any] = {"device_name": "GPU", "arch": "sm_0", "commit": "c0ffee", "versions": {"torch": "1"}}


def kernel_row(variant: str, seconds: float) -> dict[str, Any]:
    return {
        **ABOUT,
        "case": "rms_norm",
        "model": "Llama-3-8B",
        "variant": variant,
        "sizes": {"tokens": 8192, "hidden": 4096},
        "dtype": "bfloat16",
        "seconds": {"p50": seconds},
        "share_of_copy": 0.9,
        "share_of_matmul": 0.0,
        "extra_peak_bytes": 5e6,
    }


def training_row(variant: str, **figures: Any) -> dict[str, Any]:
    job = {"model": "Llama-3.2-1B", "layers": 16, "method": "full", "layout": "packed", "rows": 4, "length": 2048}
    return {
        **ABOUT,
        **job,
        "case": "e2e",
        "variant": variant,
        "dtype": "bfloat16",
        "tokens": 100,
        "data": {"source": "texts"},
        **figures,
    }


def test_summary_sets_ours_against_the_best_peer_and_vanilla() -> None:
    speed = {"seconds": 1.0, "mfu": 0.4, "peak_memory_bytes": 2e9}
    rows = [
        kernel_row("eager", 4e-3),
        kernel_row("ours", 1e-3),
        kernel_row("liger", 2e-3),
        kernel_row("quack", 1.1e-3),
        training_row("vanilla", tokens_per_second=1000.0, **speed),
        training_row("ours", tokens_per_second=1500.0, **{**speed, "peak_memory_bytes": 1e9}),
        training_row("unsloth", skipped="unsloth is not installed."),
    ]
    text = summary(rows)
    sizes = "Llama-3-8B tokens 8192 hidden 4096 bfloat16"
    assert f"| rms_norm | {sizes} | 1 ms | 90% | 0% | 5 | quack 1.1 ms | 1.10x | 4.00x |" in text
    assert "| ours | 1500 | 1.50x | 40.0% | 1.00 | 0.50x | - | - | - | - |" in text
    assert "- unsloth: unsloth is not installed." in text
    assert text.startswith("GPU sm_0, commit c0ffee: torch 1")


def test_summary_reads_the_rows_of_a_run_that_was_ended(tmp_path: Path) -> None:
    row = json.dumps(kernel_row("ours", 1e-3))
    (tmp_path / "kernels.jsonl").write_text(f"{row}\n{row[:40]}")
    assert len(read(tmp_path)) == 1


@pytest.mark.slow
def test_tiny_run_from_end_to_end(tmp_path: Path) -> None:
    done = h100("--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "done").read_text().split() == ["tests", "kernels", "lora", "fp8", "e2e", "table"]
    cases = {row["case"] for row in read(tmp_path)}
    assert cases == {"rms_norm", "lora", "fp8", "e2e"}
    table = (tmp_path / "summary.md").read_text()
    assert "| rms_norm |" in table
    assert "tiny (2 layers), lora, padded rows" in table
    assert "over the frozen base" in table
    assert "done before" in h100("--tiny", "kernels", "--out", str(tmp_path)).stdout
