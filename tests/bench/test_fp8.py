"""`python -m bench fp8`: the linears of a layer by every library, and what 8-bit products gain is said beside it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from automodel_accel.kernels.facts import this_machine
from bench import __main__ as command_line
from bench import rows as rows_module
from bench import suite, worker
from bench.case import Case, leaves, make_inputs
from bench.cases import cases
from bench.e2e.compare import failed
from bench.e2e.summary import summary
from bench.e2e.variants import parse
from bench.fp8 import Gain, gains, trainings
from bench.operations import FP8
from bench.peers import OURS, PEERS
from bench.variants import ROOT, take_part
from tests.bench import made

SMALL: dict[str, int | float] = {"tokens": 24, "in_features": 64, "out_features": 48, "out_features_2": 32, "trains": 1}
CASE = Case("fp8", "custom", SMALL, {}, "float32")
FROZEN = replace(CASE, sizes={**SMALL, "trains": 0})
ROWWISE = replace(CASE, options={"implementation": "rowwise"})


@pytest.mark.parametrize("case", [CASE, FROZEN, ROWWISE], ids=["trains", "frozen", "rowwise"])
def test_ours_has_the_error_of_8_bits_and_eager_has_none(case: Case) -> None:
    assert FP8.wrong is not None
    assert worker.error(PEERS["eager"].forward("fp8"), case, "cpu") < 1e-5
    assert 1e-3 < worker.error(PEERS[OURS].forward("fp8"), case, "cpu") < FP8.wrong


@pytest.mark.parametrize("peer", ["eager", OURS])
def test_frozen_weights_get_no_gradient(peer: str) -> None:
    for case, trained in ((CASE, {"x", "weight_0", "weight_1"}), (FROZEN, {"x"})):
        inputs = make_inputs(FP8, case.sizes, {}, torch.float32, "cpu")
        outputs = PEERS[peer].forward("fp8")(inputs)
        torch.autograd.backward(outputs, inputs["grads"])
        assert {name for name, tensor in leaves(inputs).items() if tensor.grad is not None} == trained


def test_weights_that_train_are_cast_in_each_call_and_frozen_ones_once() -> None:
    for case, same in ((CASE, False), (FROZEN, True)):
        inputs = make_inputs(FP8, case.sizes, {}, torch.float32, "cpu")
        forward = PEERS[OURS].forward("fp8")
        forward(inputs)
        first = inputs.get("held") and inputs["held"].cast
        forward(inputs)
        assert (first is not None and inputs["held"].cast is first) is same


def test_every_group_of_a_layer_trains_and_is_frozen() -> None:
    found = cases(FP8, "cuda", "bfloat16", models=("Llama-3-8B",), tokens=(2048, 8192, 32768))
    assert len(found) == 3 * 4 * 2 == len({case.label for case in found})
    assert "Llama-3-8B, 8192 tokens, 4096 to 4096 + 1024 + 1024, weights frozen" in {case.label for case in found}
    # 218 103 808 weights in the seven linears of that layer
    flops = {kind: sum(FP8.flops(one.sizes) for one in found if one.sizes["trains"] == kind) for kind in (0, 1)}
    assert flops == {0: 4 * 43008 * 218103808, 1: 6 * 43008 * 218103808}
    for case in cases(FP8, "cpu", "float32", quick=True):
        assert all(size % 16 == 0 for name, size in case.sizes.items() if "features" in name)


def test_bytes_are_those_that_must_move() -> None:
    one = {"tokens": 10, "in_features": 3, "out_features": 5}
    assert FP8.bytes_floor({**one, "trains": 0}, 2) == 2 * (2 * 30 + 2 * 50 + 15) + 15
    assert FP8.bytes_floor({**one, "trains": 1}, 2) == 2 * (2 * 30 + 2 * 50 + 30) + 15 + 30


def test_who_takes_part_and_who_says_why_not() -> None:
    variants, refused = take_part(CASE, this_machine(), ())
    names = [variant.name for variant in variants]
    assert names[0] == "eager"
    assert names[-2:] == ["ours:rowwise", "ours"]
    for name in ("torchao", "torchao-compile", "te"):
        assert name in names or "is not installed" in refused[name] or "runs on a GPU" in refused[name]


@pytest.mark.parametrize("case", [CASE, FROZEN], ids=["trains", "frozen"])
def test_torchao_computes_the_same(case: Case) -> None:
    pytest.importorskip("torchao")
    assert FP8.wrong is not None
    assert 1e-3 < worker.error(PEERS["torchao"].forward("fp8"), case, "cpu") < FP8.wrong


def row(variant: str, seconds: float, part: int, **about: Any) -> dict[str, Any]:
    """Of one group of linears."""
    return {
        **{"case": "fp8", "model": "Llama-3-8B", "variant": variant, "cut": "", "dtype": "bfloat16"},
        **{"device_name": "GPU", "arch": "sm_90", "commit": "c0ffee", "versions": {"torch": "1"}},
        **{"share_of_copy": 0.1, "share_of_matmul": 0.5, "extra_peak_bytes": 1},
        **{"sizes": {"tokens": 8192, "in_features": part, "trains": 1}, "seconds": {"p50": seconds}},
        **about,
    }


def layer(variant: str, seconds: float, **about: Any) -> list[dict[str, Any]]:
    return [row(variant, seconds, part, **about) for part in range(1, 5)]


def test_linears_can_miss_the_target_and_never_hit_it() -> None:
    rows = [*layer("eager", 9.0), *layer("eager", 6e-3), *layer("torchao", 5.9e-3), *layer("ours", 5e-3)]
    rows += [row("te", 1.0, 1), *layer("ours:rowwise", 5.1e-3)]
    (pairs,) = gains(rows)
    assert [pair.rows[0]["variant"] for pair in pairs] == ["torchao", "ours", "ours:rowwise"], "te has one of four"
    assert pairs[1].faster == pytest.approx(1.2)
    assert pairs[1].seconds == pytest.approx(20e-3)
    assert [pair.verdict for pair in pairs] == ["-", "1.20x: missed", "1.20x: missed"]
    fast = Gain(tuple(layer("ours", 4e-3)), tuple(layer("eager", 6e-3)))
    assert fast.verdict == "1.20x: the trainings decide"
    frozen = [{**one, "sizes": {**one["sizes"], "trains": 0}} for one in layer("ours", 5e-3)]
    assert Gain(tuple(frozen), fast.eager).verdict == "1.35x: missed"
    for elsewhere in ({"arch": "x86_64"}, {"dtype": "float32"}, {"cut": "in"}, {"model": "Llama-3.2-1B"}):
        assert Gain(tuple(layer("ours", 4e-3, **elsewhere)), fast.eager).verdict == "-"
    text = summary(rows)
    assert "**fp8: Llama-3-8B, 8192 tokens, weights that train, bfloat16**" in text
    assert "| ours | 20 ms | 1.20x | 1.20x: missed |" in text


def training(variant: str, speed: float, method: str, **about: Any) -> dict[str, Any]:
    job = {"model": "Llama-3-8B", "layers": 32, "method": method, "layout": "packed", "rows": 2, "length": 4096}
    return {
        **{**job, "variant": variant, "dtype": "bfloat16", "device_name": "GPU", "arch": "sm_90", "seconds": 1.0},
        **{"tokens_per_second": speed, **about},
    }


def test_trainings_are_judged_beside_ours_without() -> None:
    assert parse("ours:fp8=auto")[1] == {"fp8": "auto"}
    rows = [training("ours", 100, "full"), training("ours:fp8=auto", 121, "full"), training("ours:fp8=auto", 9, "lora")]
    assert list(trainings(rows)) == [("ours:fp8=auto", "121", "1.21x", "1.20x: hit")]
    rows += [training("ours", 10, "lora"), training("vanilla", 1, "lora"), training("ours:fp8=rowwise", 13, "lora")]
    assert [cells[-1] for cells in trainings(rows)] == ["1.20x: hit", "1.35x: missed", "1.35x: missed"]
    skipped = [training("ours", 1, "full"), {**training("ours:fp8=auto", 1, "full"), "skipped": "no"}]
    del skipped[1]["seconds"]
    assert list(trainings(skipped)) == []


def test_another_loss_is_a_failure_of_the_same_arithmetic_alone() -> None:
    wrong = {"loss_agrees": False, "loss_difference": 0.5, "loss_allowed": 0.1}
    names = "ours", "ours:fp8=auto", "ours:fp8=false"
    said = failed([training(name, 1, "full", **wrong) for name in names])
    assert [line.split(" rows: ")[1].split(": loss")[0] for line in said] == ["ours", "ours:fp8=false"]
    assert len(failed([training("ours:fp8=auto", 1, "full", skipped="crashed: no")])) == 1


class Answers:
    """Stands in for the processes that measure; 8-bit products take half the time."""

    def __init__(self, root: Path, threads: int) -> None:
        pass

    def start(self) -> None:
        pass

    def ask(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        if "rates" in request:
            return made.RATES
        return made.measured(0.002 if request["peer"] == "eager" else 0.001)

    def close(self) -> None:
        pass


def test_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rows_module, "RESULTS", tmp_path)
    monkeypatch.setattr(suite, "Worker", Answers)
    monkeypatch.setattr(command_line, "check_tests", lambda operations, at_once=False: {})
    assert command_line.main(["fp8", "--tokens", "32", "--in-features", "64", "--dtype", "float32"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "fp8.jsonl").read_text().splitlines()]
    assert {(one["variant"], one["sizes"]["trains"]) for one in rows} >= {("ours", 0), ("ours", 1), ("ours:rowwise", 1)}
    printed = " ".join(capsys.readouterr().out.split())
    assert "fp8: custom, 32 tokens, frozen weights, float32" in printed
    assert "2.00x" in printed
    if this_machine().device == "cpu":
        assert "multiplies 8-bit values no faster than others" in printed


def test_a_part_of_the_whole_run(tmp_path: Path) -> None:
    command = ["bash", "bench/h100.sh", "--python", sys.executable, "fp8", "e2e", "--dry-run", "--out", str(tmp_path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert " kernels --op fp8 --models Llama-3-8B,Llama-3.2-1B --tokens 8192,2048,32768" in said
    assert said.count("ours:fp8=auto") == 2
