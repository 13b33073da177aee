"""Every operation in this process, ours beside eager torch, at sizes that take no time: `pytest bench/` prints both."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from automodel_accel.kernels.facts import this_machine
from bench.case import Case, forward_and_backward, make_inputs
from bench.cases import cases
from bench.operations import OPERATIONS
from bench.peers import EAGER, OURS, PEERS

DEVICE = "cuda" if this_machine().device == "cuda" else "cpu"
CASES = [case for operation in OPERATIONS.values() for case in cases(operation, DEVICE, "float32", quick=True)]


@pytest.mark.parametrize("peer", [EAGER, OURS])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}-{case.model}")
def test_forward_and_backward(benchmark: BenchmarkFixture, case: Case, peer: str) -> None:
    benchmark.group = f"{case.operation}, {case.label}"
    forward = PEERS[peer].forward(case.operation)
    inputs = make_inputs(OPERATIONS[case.operation], case.sizes, case.options, torch.float32, DEVICE)
    outputs = benchmark(forward_and_backward, forward, inputs)
    assert all(output.isfinite().all() for output in outputs)
