"""`python -m bench lora`: an adapted layer is the same by every peer, and what its adapters cost is said beside it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

import automodel_accel as accel
from automodel_accel.kernels.facts import this_machine
from bench import __main__ as command_line
from bench import rows as rows_module
from bench import suite, worker
from bench.case import Case, leaves, make_inputs
from bench.cases import cases
from bench.e2e.summary import read, summary
from bench.operations import LORA, LORA_LAYER, adapted_shapes, frozen_flops
from bench.overhead import TARGETS, Overhead, overheads
from bench.peers import OURS, PEERS
from bench.variants import take_part
from tests.bench import made

SMALL: dict[str, int | float] = {
    **{"tokens": 16, "hidden": 32, "intermediate": 48, "heads": 4, "key_heads": 2, "head_dim": 8, "rank": 3}
}
ADAPTED = Case("lora_layer", "custom", SMALL, {"scale": 2.0, "eps": 1e-5}, "float32")
FROZEN = replace(ADAPTED, sizes={**SMALL, "rank": 0})
SELECTIVE = replace(ADAPTED, options={**ADAPTED.options, "implementation": "selective"})


@pytest.mark.parametrize("case", [ADAPTED, FROZEN, SELECTIVE], ids=["adapted", "frozen", "selective"])
@pytest.mark.parametrize("peer", ["eager", "peft", OURS])
def test_a_layer_is_the_same_by_every_peer(peer: str, case: Case) -> None:
    assert worker.error(PEERS[peer].forward("lora_layer"), case, "cpu") < 1e-5


def test_ours_is_measured_with_its_fusions() -> None:
    from bench.layer import build

    inputs = make_inputs(LORA_LAYER, SMALL, ADAPTED.options, torch.float32, "cpu")
    model = accel.apply(build(inputs))
    model(inputs_embeds=inputs["x"]).last_hidden_state.sum().backward()
    counts = accel.report(model).counts
    assert counts.fused["linear"] == 4, "q, k and v; o; gate and up; down"
    assert not [reason for reason in counts.passed_on if reason.startswith("linear")]
    trained = {name for name, tensor in leaves(inputs).items() if tensor.grad is not None}
    assert trained == {"x", *(f"{name}_{part}" for name in adapted_shapes(SMALL) for part in "ab")}


@pytest.fixture
def liger() -> Iterator[None]:
    """Liger-Kernel in the interpreter; its patch ends with the test."""
    pytest.importorskip("liger_kernel")
    if not this_machine().triton_interpreter:
        pytest.skip("the bench itself compares them on a GPU")
    from tests.budgets.liger import runnable

    with runnable(), pytest.MonkeyPatch.context() as patch:
        for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
            patch.setattr(modeling_llama, name, getattr(modeling_llama, name))
        yield


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("case", [ADAPTED, FROZEN], ids=["adapted", "frozen"])
def test_liger_computes_the_same_layer(case: Case) -> None:
    from bench.layer import build
    from bench.peers.peft import _patched_by_liger

    assert worker.error(PEERS["peft+liger"].forward("lora_layer"), case, "cpu") < 1e-5
    inputs = make_inputs(LORA_LAYER, case.sizes, case.options, torch.float32, "cpu")
    layer: Any = build(inputs, _patched_by_liger).layers[0]  # type: ignore[index,union-attr]
    assert "liger" in layer.input_layernorm.forward.__module__
    assert "liger" in layer.mlp.forward.__module__
    assert "liger" in modeling_llama.apply_rotary_pos_emb.__module__


def test_every_case_stands_beside_the_same_one_without_adapters() -> None:
    for operation in (LORA, LORA_LAYER):
        found = cases(operation, "cuda", "bfloat16", models=operation.models, tokens=(8192,))
        ranks = {case.model: [one.sizes["rank"] for one in found if one.model == case.model] for case in found}
        assert ranks == {name: [16, 0] for name in operation.models}
        assert len({case.label for case in found}) == len(found)
    assert TARGETS.keys() <= set(LORA_LAYER.models)


def test_who_takes_part_and_who_says_why_not() -> None:
    variants, refused = take_part(ADAPTED, this_machine(), ())
    names = [variant.name for variant in variants]
    assert names[-2:] == ["ours:selective", "ours"]
    for name in ("peft+liger", "unsloth"):
        if name not in names:
            assert refused[name]
    on_a_gpu = replace(this_machine(), device="cuda")
    absent = replace(PEERS["peft+liger"], package="peft+no-such-package")
    assert absent.objection("lora_layer", on_a_gpu) == "the package peft+no-such-package is not installed"


def row(variant: str, seconds: float, rank: int, **about: Any) -> dict[str, Any]:
    """Of a machine whose large products run at 1e15 FLOPs a second."""
    shape = {"hidden": 4096, "intermediate": 14336, "heads": 32, "key_heads": 8, "head_dim": 128}
    return {
        **{"case": "lora_layer", "model": "Llama-3-8B", "variant": variant, "cut": "", "dtype": "bfloat16"},
        **{"device_name": "GPU", "arch": "sm_90", "commit": "c0ffee", "versions": {"torch": "1"}},
        **{"share_of_copy": 0.1, "share_of_matmul": 0.5, "extra_peak_bytes": 1},
        **{"sizes": {"tokens": 8192, **shape, "rank": rank}, "seconds": {"p50": seconds}},
        "rates": {"matmul_flops_per_second": 1e15},
        **about,
    }


def test_overhead_is_of_the_same_variant_and_judged_by_the_products() -> None:
    # 218 103 808 weights in the seven linears of that layer
    products = 4 * 8192 * 218103808 / 1e15
    rows = [
        row("peft", 9.0, 0),
        row("peft", 9.0, 0),
        row("peft", 20e-3, 16),
        row("peft", 17e-3, 0),
        row("ours", 1.0, 16),
    ]
    rows += [row("ours", 16e-3, 16), row("ours", 16e-3 - 0.08 * products, 0), row("unsloth", 1.0, 16)]
    (pairs,) = overheads(rows)
    assert [pair.row["variant"] for pair in pairs] == ["peft", "ours"]
    peft, ours = pairs
    assert frozen_flops(ours.row["sizes"]) == 4 * 8192 * 218103808
    assert peft.added == pytest.approx(3e-3)
    assert peft.of_base == pytest.approx(3 / 17)
    assert peft.of_products == pytest.approx(3e-3 / products)
    assert (peft.verdict, ours.verdict) == ("-", "7%: missed")
    assert Overhead(ours.row, row("ours", 16e-3 - 0.06 * products, 0)).verdict == "7%: hit"
    for elsewhere in ({"arch": "x86_64"}, {"dtype": "float32"}, {"cut": "hidden 4096 -> 8"}, {"model": "custom"}):
        assert Overhead(row("ours", 16e-3, 16, **elsewhere), ours.base).verdict == "-"
    text = summary(rows)
    assert "**lora_layer: Llama-3-8B, 8192 tokens, rank 16, bfloat16: over the frozen base**" in text
    assert "| peft | 17 ms | 20 ms | 3 ms | 17.6% |" in text
    assert "| 7%: missed |" in text


class Answers:
    """Stands in for the processes that measure; the case with adapters takes a millisecond more."""

    def __init__(self, root: Path, threads: int) -> None:
        pass

    def start(self) -> None:
        pass

    def ask(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        if "rates" in request:
            return made.RATES
        return made.measured(0.002 if request["case"]["sizes"]["rank"] else 0.001)

    def close(self) -> None:
        pass


def test_one_command_measures_the_linears_and_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows_module, "RESULTS", tmp_path)
    monkeypatch.setattr(suite, "Worker", Answers)
    monkeypatch.setattr(command_line, "check_tests", lambda operations, at_once=False: {})
    sizes = [word for name, size in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    assert command_line.main(["lora", *sizes, "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    for operation in ("lora", "lora_layer"):
        rows = [json.loads(line) for line in (tmp_path / f"{operation}.jsonl").read_text().splitlines()]
        assert {one["sizes"]["rank"] for one in rows} == {3, 0}
        assert f"{operation}: custom, 16 tokens, rank 3, float32: over the frozen base" in " ".join(printed.split())
    assert "100.0%" in printed


@pytest.mark.slow
def test_a_quick_run_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows_module, "RESULTS", tmp_path)
    monkeypatch.setattr(command_line, "check_tests", lambda operations, at_once=False: {})
    few = ["--peers", "peft,peft+liger,unsloth", "--repetitions", "1", "--seconds", "0.1"]
    assert command_line.main(["kernels", "--op", "lora_layer,lora", "--quick", *few]) == 0
    rows = read(tmp_path)
    assert {"eager", "peft", "ours:selective", "ours"} <= {one["variant"] for one in rows}
    assert {one["case"] for one in rows} == {"lora", "lora_layer"}
    assert all(one["version"] for one in rows)
    assert all(str(Path.home()) not in json.dumps(one) for one in rows)
    printed = " ".join(capsys.readouterr().out.split())
    assert "over the frozen base" in printed
    if this_machine().device == "cpu":
        for name in ("peft+liger", "unsloth"):
            assert f"Not measured: lora_layer by {name}" in printed
