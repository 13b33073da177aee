"""Which implementation is chosen, on machines that are made up; and what this machine is."""

import dataclasses
import importlib.util
from collections.abc import Mapping

import pytest
import torch

from automodel_accel.kernels.contract import (
    Implementation,
    Kernel,
    Refusal,
    Spec,
    choose,
    implementation_module,
    unknown_name,
)
from automodel_accel.kernels.facts import Facts, this_machine

FLOATS = frozenset({torch.float32, torch.bfloat16})
KERNEL = Kernel(
    name="norm",
    reference=torch.relu,
    implementations=(
        Implementation(
            name="triton",
            module="nowhere.fused",
            devices=frozenset({"cuda", "xpu"}),
            dtypes=FLOATS,
            max_size=65536,
            needs="triton",
        ),
        Implementation(
            name="torch", module="math", devices=frozenset({"cuda", "cpu"}), dtypes=FLOATS | {torch.float64}
        ),
    ),
)


def machine(device: str, packages: Mapping[str, str], interpreter: bool = False) -> Facts:
    """A machine that is made up."""
    return Facts(
        python="3.11.0",
        torch="2.13.0",
        device=device,
        device_name="made up",
        arch="sm_90" if device == "cuda" else "x86_64",
        memory_bytes=80 * 2**30,
        processors=132,
        triton_interpreter=interpreter,
        packages=packages,
    )


H100 = machine("cuda", {"triton": "3.6.0"})
CPU = machine("cpu", {"triton": "3.6.0"})
ROW = Spec("cuda", torch.bfloat16, 4096)
CPU_ROW = Spec("cpu", torch.float32, 4096)


def test_a_gpu_with_triton_takes_triton_and_refuses_nothing() -> None:
    choice = choose(KERNEL, H100, ROW)
    assert choice.winner is KERNEL.implementations[0]
    assert choice.refused == ()


@pytest.mark.parametrize(
    ("facts", "spec", "reason"),
    [
        (machine("cuda", {}), ROW, "the package triton is not installed"),
        (H100, dataclasses.replace(ROW, size=65537), "takes rows of at most 65536 elements; these have 65537"),
        (H100, dataclasses.replace(ROW, dtype=torch.float64), "the tensors are torch.float64"),
        (CPU, CPU_ROW, "runs on cuda and xpu; the tensors are on cpu"),
        (machine("cpu", {"triton": "3.6.0"}, interpreter=True), CPU_ROW, "slow, so it must be named"),
    ],
)
def test_otherwise_torch_is_taken_and_the_reason_against_triton_is_given(facts: Facts, spec: Spec, reason: str) -> None:
    choice = choose(KERNEL, facts, spec)
    assert choice.winner is KERNEL.implementations[1]
    (refusal,) = choice.refused
    assert refusal.what == "norm: triton"
    assert reason in refusal.reason


def test_the_longest_row_is_taken() -> None:
    assert choose(KERNEL, H100, dataclasses.replace(ROW, size=65536)).winner is KERNEL.implementations[0]


def test_an_implementation_that_is_named_is_taken_or_refused_and_never_replaced() -> None:
    assert choose(KERNEL, H100, ROW, "torch").winner is KERNEL.implementations[1]
    assert choose(KERNEL, machine("cpu", {"triton": "3.6.0"}, interpreter=True), CPU_ROW, "triton").winner is not None
    choice = choose(KERNEL, CPU, CPU_ROW, "triton")
    assert choice.winner is None
    assert [str(refusal) for refusal in choice.refused] == [
        "norm: triton: runs on cuda and xpu; the tensors are on cpu"
    ]


def test_when_none_serves_every_reason_is_given() -> None:
    choice = choose(KERNEL, H100, Spec("mps", torch.float32, 64))
    assert choice.winner is None
    assert [refusal.what for refusal in choice.refused] == ["norm: triton", "norm: torch"]
    with pytest.raises(ValueError, match=r"norm: triton: .*; norm: torch: .*Ask for implementation='auto'"):
        implementation_module(KERNEL, "mps", torch.float32, 64, "auto")


def test_an_unknown_name_is_an_error_with_the_nearest_right_one() -> None:
    with pytest.raises(
        ValueError, match=r"unknown implementation of norm 'tritn'. Did you mean 'triton'. Known: auto, triton, torch"
    ):
        choose(KERNEL, H100, ROW, "tritn")
    assert unknown_name("fusion", "zzz", ["norm", "mlp"]) == "unknown fusion 'zzz'. Known: norm, mlp."


def test_a_refusal_reads_as_one_sentence() -> None:
    assert str(Refusal("norm: te", "needs sm_90")) == "norm: te: needs sm_90"
    assert str(Refusal("norm: te", "needs sm_90", "torch serves")) == "norm: te: needs sm_90; torch serves"


def test_the_module_of_the_winner_is_imported_once_for_each_kind_of_call() -> None:
    implementation_module.cache_clear()
    for _ in range(3):
        assert implementation_module(KERNEL, "cpu", torch.float64, 8, "auto").__name__ == "math"
    assert implementation_module.cache_info().misses == 1


def test_this_machine() -> None:
    facts = this_machine()
    assert facts.torch == torch.__version__
    assert facts.device == ("cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu")
    assert facts.memory_bytes > 2**28
    assert facts.processors >= 1
    assert facts.triton_interpreter is not torch.cuda.is_available()
    assert facts.has("triton") is ("triton" in facts.packages)
    assert not facts.has("no-such-package")
    with pytest.raises(dataclasses.FrozenInstanceError):
        facts.device = "cuda"  # type: ignore[misc]


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_the_interpreter_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, value: str, on: bool) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert this_machine.__wrapped__().triton_interpreter is on


def test_an_optional_package_that_is_missing_is_not_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"triton": object()}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    assert set(this_machine.__wrapped__().packages) == {"triton"}
