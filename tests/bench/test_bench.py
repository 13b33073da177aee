"""The benchmarks run, say what they measured, and stay silent where the operation's tests are red."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from automodel_accel.kernels.facts import this_machine
from bench import __main__ as command_line
from bench import rows as rows_module
from bench import suite, worker
from bench.against import revision
from bench.case import Inputs, as_tuple, make_inputs
from bench.cases import cases, custom
from bench.measure import measure
from bench.models import MODELS
from bench.operations import LINEAR_CROSS_ENTROPY, OPERATIONS, RMS_NORM
from bench.peers import EAGER, OURS, PEERS
from bench.variants import ROOT, take_part
from tests.bench import made

GREEN = ("tests/ops/test_linear_cross_entropy.py", "-k", "test_scale")
RED = ("tests/ops/test_linear_cross_entropy.py", "-k", "no test has this name")
SIZES: dict[str, int | float] = {"tokens": 256, "hidden": 64, "vocab": 8192, "ignored": 0.5}
SMALL = ["linear_cross_entropy", *(word for name, size in SIZES.items() for word in (f"--{name}", str(size)))]
QUICK = [*SMALL, "--repetitions", "1", "--seconds", "0.1", "--peers", "eager", "--dtype", "float32"]
HEAD = custom(LINEAR_CROSS_ENTROPY, SIZES, "float32")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows go to a folder of the test, and the operation's tests are one that takes a second."""
    monkeypatch.setattr(rows_module, "RESULTS", tmp_path)
    monkeypatch.setitem(OPERATIONS, "linear_cross_entropy", replace(LINEAR_CROSS_ENTROPY, tests=GREEN))
    return tmp_path / "linear_cross_entropy.jsonl"


def test_quick_run(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(QUICK) == 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in results.read_text().splitlines()]
    assert rows[0]["variant"] == EAGER
    assert rows[-1]["variant"] == OURS
    for row in rows:
        assert (row["sizes"], row["cut"], row["model"]) == (SIZES, "", "custom")
        assert row["flops"] == 6 * 128 * 64 * 8192
        assert row["bytes_floor"] == 3 * (8192 + 256) * 64 * 4
        assert 0 < row["seconds"]["min"] <= row["seconds"]["p20"] <= row["seconds"]["p50"] <= row["seconds"]["max"]
        assert 0 < row["forward_seconds"]["p50"] < row["seconds"]["max"]
        assert row["cpu_seconds"]["min"] > 0
        assert (row["operation"], row["dtype"], row["threads"]) == ("linear_cross_entropy", "float32", 1)
        assert {"python", "torch"} <= row["versions"].keys()
        assert {"device", "device_name", "arch", "commit", "dirty", "time", "version", "error"} <= row.keys()
        assert row["share_of_copy"] * row["rates"]["copy_bytes_per_second"] * row["seconds"]["p50"] == pytest.approx(
            row["bytes_floor"]
        )
        assert str(Path.home()) not in json.dumps(row)
    # half of 256 x 8192 logits and the weight's gradient, against three times all logits
    assert 2 * 2**20 <= rows[-1]["extra_peak_bytes"] < rows[0]["extra_peak_bytes"] / 2
    assert rows[0]["implementation"] is None
    assert rows[-1]["implementation"] in ("torch", "triton")
    printed = capsys.readouterr().out
    assert "eager" in printed
    assert f"{len(rows)} rows appended to bench/results/: linear_cross_entropy.jsonl" in printed


def test_no_speed_where_tests_are_red(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OPERATIONS, "linear_cross_entropy", replace(LINEAR_CROSS_ENTROPY, tests=RED))
    assert command_line.main(QUICK) == 1
    assert not results.exists()
    printed = capsys.readouterr().out
    assert "its tests are red, so no speed is measured" in printed
    assert "eager" not in printed


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    assert "python -m bench linear_cross_entropy --tokens 8192" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["linear_cros"], [*QUICK, "--repetitions", "0"], [*QUICK, "--dtype", "int8"]])
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_line.main(arguments)
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--op", "rms_nrom"], "unknown operation 'rms_nrom'. Did you mean 'rms_norm'?"),
        (["--models", "Qwen3-0.6"], "unknown model 'Qwen3-0.6'. Did you mean 'Qwen3-0.6B'?"),
        (["--peers", "ligr"], "unknown peer 'ligr'. Did you mean 'liger'?"),
        (["--against", "no-such-revision"], "git knows no such revision"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(
    arguments: list[str], sentence: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["kernels", "--quick", *arguments]) == 2
    assert sentence in " ".join(capsys.readouterr().out.split())
    assert not results.exists()


class Answers:
    """Stands in for the processes that measure: each peer has one answer, and all requests are kept."""

    def __init__(self, **by_peer: dict[str, Any]) -> None:
        self.by_peer = by_peer
        self.asked: list[str] = []

    def __call__(self, root: Path, threads: int) -> "Answers":
        return self

    def ask(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        if "rates" in request:
            return made.RATES
        self.asked.append(request["peer"])
        return self.by_peer[request["peer"]]

    def close(self) -> None:
        pass


def run(monkeypatch: pytest.MonkeyPatch, answers: Answers, until: float = math.inf) -> suite.Outcome:
    monkeypatch.setattr(suite, "Worker", answers)
    settings = suite.Settings(repetitions=2, peers=("torch",))
    with suite.Suite(settings) as running:
        (outcome,) = running.run([HEAD], until)
    return outcome


def test_runs_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(eager=made.measured(0.3), torch=made.measured(0.2), ours=made.measured(0.1))
    outcome = run(monkeypatch, answers)
    one_way = [EAGER, "torch", *[OURS] * (len(answers.asked) // 2 - 2)]
    assert answers.asked == [*one_way, *reversed(one_way)]
    assert [row["variant"] for row in outcome.rows][:2] == [EAGER, "torch"]
    assert outcome.rows[-1]["repetition_seconds"] == [0.1, 0.1]


def test_a_peer_that_cannot_is_skipped_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(eager=made.measured(0.3), torch={"refused": "has no soft-cap"}, ours=made.measured(0.1))
    outcome = run(monkeypatch, answers)
    assert outcome.skipped["torch"] == "has no soft-cap"
    assert "torch" not in [row["variant"] for row in outcome.rows]
    assert answers.asked.count("torch") == 1
    assert not outcome.broken


def test_a_case_for_which_no_time_is_left_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(eager=made.measured(0.3), torch=made.measured(0.2), ours=made.measured(0.1))
    outcome = run(monkeypatch, answers, until=0.0)
    assert not answers.asked
    assert not outcome.rows
    assert outcome.skipped[OURS] == "no time was left for custom, 256 tokens, 50% ignored"


def test_that_ours_fails_is_not_skipped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(eager=made.measured(0.3), torch=made.measured(0.2), ours={"failed": "RuntimeError: broken"})
    outcome = run(monkeypatch, answers)
    assert OURS in outcome.broken
    assert outcome.skipped[OURS] == "failed: RuntimeError: broken"


def test_a_process_that_dies_says_why_and_another_takes_its_place() -> None:
    one = suite.Worker(ROOT, 1)
    answer = one.ask({"peer": "nobody", "seconds": 0.1, "memory": False, "case": made.asked()}, 60)
    assert answer == {"failed": "KeyError: 'nobody'"}
    assert one.process is None
    assert "seconds" in one.ask({"peer": EAGER, "seconds": 0.01, "memory": False, "case": made.asked()}, 60)
    assert (
        "no answer in 0 s"
        in one.ask({"peer": EAGER, "seconds": 600.0, "memory": False, "case": made.asked()}, 0.01)["failed"]
    )


def test_peers_that_are_not_here_say_so() -> None:
    facts = this_machine()
    variants, refused = take_part(HEAD, replace(facts, device="cpu"), ())
    assert variants[0].name == EAGER
    assert variants[-1].name == OURS
    assert refused["te"] == "runs on a GPU; this is a cpu"
    absent = replace(PEERS["quack"], package="no-such-package")
    assert absent.objection("rms_norm", replace(facts, device="cuda")) == "the package no-such-package is not installed"
    assert PEERS[EAGER].version() == facts.torch


def test_the_whole_list_has_the_models_lengths_and_labels() -> None:
    found = cases(LINEAR_CROSS_ENTROPY, "cuda", "bfloat16")
    assert {case.model for case in found} == set(LINEAR_CROSS_ENTROPY.models)
    assert {case.sizes["tokens"] for case in found} == {512, 2048, 8192, 32768}
    assert {case.sizes["ignored"] for case in found} == {0.0, 0.5, 0.9}
    assert not any(case.cut for case in found)
    widths = [case.sizes["hidden"] for operation in OPERATIONS.values() for case in cases(operation, "cuda", "bfloat16")
              if "hidden" in case.sizes]  # fmt: skip
    assert any(int(width) & (int(width) - 1) for width in widths), "one that is no power of 2"
    assert len({(case.model, *case.sizes.values()) for case in found}) == len(found)


def test_on_a_cpu_a_case_says_how_it_was_cut() -> None:
    for case in cases(LINEAR_CROSS_ENTROPY, "cpu", "float32"):
        whole = MODELS[case.model].vocab
        assert case.sizes["tokens"] == 512
        assert case.cut == f"vocab {whole} -> {case.sizes['vocab']}"
        assert case.sizes["vocab"] < whole


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=lambda operation: operation.name)
def test_every_operation_is_the_same_by_eager_and_by_ours(operation: Any) -> None:
    case = cases(operation, "cpu", "float32", quick=True)[0]
    for name in (EAGER, OURS):
        assert worker.error(PEERS[name].forward(operation.name), case, "cpu") < (
            (name == OURS and operation.wrong) or 1e-5
        )
    assert operation.tests[0].startswith("tests/")
    assert Path(operation.tests[0]).exists()


def test_another_operation_is_noticed() -> None:
    def scaled(inputs: Inputs) -> torch.Tensor:
        (found,) = as_tuple(PEERS[EAGER].forward("rms_norm")(inputs))
        return found * 1.01

    def halved(inputs: Inputs) -> torch.Tensor:
        found: torch.Tensor = inputs["x"] * 0.5
        return found

    def nothing(inputs: Inputs) -> torch.Tensor:
        found: torch.Tensor = inputs["x"] * inputs["weight"] * math.nan
        return found

    case = custom(RMS_NORM, RMS_NORM.custom, "float32")
    assert worker.error(scaled, case, "cpu") > worker.WRONG[torch.float32]
    assert worker.error(halved, case, "cpu") == math.inf, "no gradient of the weight"
    assert worker.error(nothing, case, "cpu") == math.inf


def test_memory_is_what_torch_allocates() -> None:
    def forward(inputs: Inputs) -> torch.Tensor:
        x: torch.Tensor = inputs["x"]
        return torch.empty(1000, 1000) + x.sum()  # 4 MB for each, of which one is free at the end

    tensors = {"x": torch.ones(10, requires_grad=True), "grads": (torch.ones(1000, 1000),)}
    found = measure(forward, tensors, 0.0, memory=True, compiles=False)
    assert found.extra_peak_bytes == pytest.approx(8e6, rel=1e-3)
    assert len(found.seconds) == 1
    assert 0 < found.forward_seconds[0] < found.seconds[0]


def test_inputs_hold_what_the_sizes_say() -> None:
    inputs = make_inputs(LINEAR_CROSS_ENTROPY, SIZES, HEAD.options, torch.bfloat16, "cpu")
    assert (inputs["target"] == -100).sum() == 128
    assert inputs["hidden"].shape == (256, 64)
    assert inputs["weight"].dtype == torch.bfloat16


@pytest.mark.slow
def test_another_revision_is_measured_from_its_own_files() -> None:
    if rows_module.git("rev-parse", "HEAD") is None:
        pytest.skip("this is no checkout")
    with revision("HEAD") as other:
        settings = suite.Settings(repetitions=1, seconds=0.1, peers=(EAGER,), others=(other,))
        with suite.Suite(settings) as running:
            (outcome,) = running.run([HEAD])
        assert other.root != ROOT
    assert not other.root.exists()
    assert [row["variant"] for row in outcome.rows][-2:] == [other.name, OURS]
