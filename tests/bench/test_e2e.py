"""`python -m bench e2e` trains, says what it measured, and fails where a loss curve is not vanilla's."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from automodel_accel.kernels.facts import this_machine
from bench.e2e import __main__ as command_line
from bench.e2e import documents
from bench.e2e.compare import Comparison, failed
from bench.e2e.flops import causal_pairs, step_flops
from bench.e2e.shapes import shape_of
from bench.e2e.variants import VARIANTS, parse
from tests.bench.e2e_jobs import JOB, TEXTS

Row = dict[str, Any]
ARGUMENTS = ["--tiny", "--methods", "lora", "--layouts", "padded", "--variants", "vanilla", "liger", "ours"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[Row], Path]:
    """The exit code, the rows and the folder of one run."""
    folder = tmp_path_factory.mktemp("e2e")
    code = command_line.main([*ARGUMENTS, "--out", str(folder), "--plot", str(folder / "e2e.png")])
    return code, [json.loads(line) for line in (folder / "e2e.jsonl").read_text().splitlines()], folder


def test_tiny_run_agrees_with_vanilla(run: tuple[int, list[Row], Path]) -> None:
    code, rows, folder = run
    assert code == 0
    assert [row["variant"] for row in rows] == ["vanilla", "liger", "ours"]
    vanilla, ours = rows[0], rows[2]
    assert len(ours["losses"]) == ours["steps"] == 5
    differences = [abs(one - other) for one, other in zip(ours["losses"], vanilla["losses"], strict=True)]
    assert ours["loss_difference"] == max(differences) <= ours["loss_allowed"]
    assert ours["loss_agrees"]
    assert ours["gradient_distance_worst"] <= ours["gradient_allowed"] < 1e-3
    assert ours["gradients_agree"]
    assert vanilla["loss_difference"] == 0
    assert ours["report"]["materialised_logits"] == 0
    assert ours["report"]["places"]["loss"] == 1
    assert vanilla["report"] is None
    assert (folder / "e2e.png").read_bytes()[:4] == b"\x89PNG"


def test_figures_follow_from_the_row(run: tuple[int, list[Row], Path]) -> None:
    _, rows, _ = run
    texts = documents.paragraphs_in_bytes()
    for row in (rows[0], rows[2]):
        job = replace(JOB, **{name: row[name] for name in ("method", "layout", "length", "steps", "warmup")})
        timed = documents.batches(texts, job)[row["warmup"] :]
        lengths = [length for batch in timed for length in batch.lengths]
        assert row["tokens"] == sum(lengths) < row["padded_tokens"]
        flops = step_flops(shape_of("tiny"), sum(lengths), causal_pairs(lengths), "lora", row["rank"])
        assert row["flops"] == pytest.approx(flops.total)
        assert row["flops"] == sum(row["flops_by_part"].values())
        assert row["seconds_of_runs"] == [pytest.approx(sum(steps)) for steps in row["step_seconds"]]
        assert {len(steps) for steps in row["step_seconds"]} == {len(timed)}
        assert min(row["seconds_of_runs"]) <= row["seconds"] <= max(row["seconds_of_runs"])
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / row["peak_flops"])
        assert 0 < row["mfu"] < 1
        assert 0 < row["trainable"] < row["parameters"]
        assert row["peak_memory_bytes"] >= row["memory_before_bytes"] > 0
        assert row["cpu_seconds"] > 0


def test_row_says_where_and_with_what(run: tuple[int, list[Row], Path]) -> None:
    _, rows, _ = run
    for row in rows:
        assert {"device_name", "arch", "commit", "dirty", "time", "threads", "data", "optimizer", "seed"} <= row.keys()
        assert str(Path.home()) not in json.dumps(row)
    assert {"python", "torch", "transformers", "peft"} <= rows[2]["versions"].keys()


@pytest.mark.skipif(this_machine().device != "cpu", reason="Liger runs on a GPU")
def test_what_cannot_run_says_why(run: tuple[int, list[Row], Path]) -> None:
    _, rows, _ = run
    assert rows[1]["skipped"] in ("its kernels need a GPU.", "liger_kernel is not installed.")
    assert "seconds" not in rows[1]


def test_table_lists_speed_and_what_was_skipped(
    run: tuple[int, list[Row], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    Console(width=110).print(command_line.table(run[1]))
    printed = capsys.readouterr().out
    assert "tiny (2 layers), lora, padded rows" in printed
    assert f"liger: {run[1][1]['skipped']}" in printed
    assert f"{run[1][2]['tokens_per_second']:.0f}" in printed


def test_a_variant_that_crashes_says_so_and_fails() -> None:
    comparison = Comparison([JOB], ["ours:norm=nonsense"], 1, TEXTS)
    comparison.run(time.monotonic() + 120, lambda run: None)
    rows = list(comparison.rows())
    assert rows[0]["skipped"].startswith("crashed: ValueError: ")
    assert failed(rows) == [f"tiny, full, packed rows: ours:norm=nonsense: {rows[0]['skipped']}"]


def test_nothing_begins_after_the_deadline() -> None:
    comparison = Comparison([JOB], ["vanilla", "ours"], 1, TEXTS)
    comparison.run(time.monotonic() - 1, lambda run: None)
    assert {row["skipped"] for row in comparison.rows()} == {"not run: the time was up."}


def test_curves_that_differ_fail_for_ours_alone() -> None:
    row = {"model": "m", "method": "full", "layout": "packed", "loss_difference": 0.5, "loss_allowed": 0.1}
    row["loss_agrees"] = False
    assert failed([{**row, "variant": "liger"}, {**row, "variant": "ours", "loss_agrees": True}]) == []
    assert failed([{**row, "variant": "ours:recompute=full"}]) == [
        "m, full, packed rows: ours:recompute=full: loss 0.5 off, 0.1 is allowed."
    ]
    wrong = {"gradients_agree": False, "gradient_distance_worst": 1.0, "gradient_allowed": 0.1}
    said = failed([{**row, **wrong, "variant": "ours", "loss_agrees": True, "gradient_worst_parameter": "w"}])
    assert said == ["m, full, packed rows: ours: gradient of w 1 off, 0.1 is allowed."]


def test_settings_of_ours() -> None:
    kind, settings = parse("ours:recompute=selective:norm=false:strict=True")
    assert kind is VARIANTS["ours"]
    assert settings == {"recompute": "selective", "norm": False, "strict": True}


def test_a_model_that_cannot_fit_is_not_tried() -> None:
    row = next(Comparison([replace(JOB, model="Llama-3-8B", layers=4000)], ["ours"], 1, TEXTS).rows())
    assert row["skipped"].startswith("weights, gradients and optimizer states alone take ")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--models", "Llama-9"], "there are tiny, Qwen3-0.6B"),
        (["--variants", "faster"], "no variant named 'faster'"),
        (["--variants", "liger:norm=false"], "only 'ours' takes settings"),
        (["--variants", "ours:recompute"], "expected setting=value"),
        (["--warmup", "20"], "leave none to time"),
        (["--documents", "no such file"], "no such file"),
        (["--rows", "0"], "not a positive number"),
    ],
)
def test_bad_arguments_are_refused(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_line.main([*wrong, "--out", str(tmp_path)])
    assert said in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    assert "python -m bench e2e --tiny" in capsys.readouterr().out


def test_documents_survive_a_file(tmp_path: Path) -> None:
    documents.write(TEXTS, tmp_path / "texts.json")
    assert documents.read(tmp_path / "texts.json") == TEXTS
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match='expected a JSON object with "source"'):
        documents.read(tmp_path / "other.json")
