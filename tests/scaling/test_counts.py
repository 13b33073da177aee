"""The formulae against one rank of torch's fake process group: what it holds, and what its collectives gather and sum."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import automodel_accel as accel
from automodel_accel.parallel.gradients import accumulate
from automodel_accel.parallel.mesh import Mesh
from automodel_accel.scaling.job import Job
from automodel_accel.scaling.memory import memory_of
from automodel_accel.scaling.reading import shape_of
from automodel_accel.scaling.traffic import LOSS_STATISTICS, flows
from automodel_accel.scaling.weights import gradient_bytes, optimizer_bytes, parameter_bytes
from tests.scaling.counting import Collectives, Held, local_bytes, ranks
from tests.tiny import TOKENS, batch, tiny

RANKS = 4
STEP = 4  # bytes of the step number that AdamW keeps of each parameter
# name -> mesh, settings of the model, settings of apply, settings of the job
EVEN = {"vocab_size": 128}  # FSDP2 cuts what tensor ranks have cut unevenly along another dimension
CASES: dict[str, tuple[Mesh, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "fsdp2": (Mesh(shard=RANKS), {}, {}, {}),
    "tied": (Mesh(shard=RANKS), {"tie_word_embeddings": True}, {}, {}),
    "uneven": (Mesh(shard=RANKS), {"intermediate_size": 50}, {}, {}),
    "kept gathered": (Mesh(shard=RANKS, reshard=False), {}, {}, {}),
    "bf16": (Mesh(shard=RANKS, param_dtype="bfloat16"), {}, {}, {}),
    "bf16 sums": (Mesh(shard=RANKS, reduce_dtype="bfloat16"), {}, {}, {}),
    "hsdp": (Mesh(replicate=2, shard=2), {}, {}, {}),
    "lora": (Mesh(shard=RANKS), {}, {"lora": {"r": 4, "target_modules": "all-linear"}}, {}),
    "recompute": (Mesh(shard=RANKS), {}, {"recompute": "full"}, {"recompute": "full"}),
    "accumulated": (Mesh(shard=RANKS), {}, {}, {"accumulate": 3}),
    "tensor": (Mesh(shard=2, tensor=2), EVEN, {}, {}),
    "tensor, MLPs computed again": (Mesh(shard=2, tensor=2), EVEN, {"recompute": "mlp"}, {"recompute": "mlp"}),
    "sequence": (Mesh(shard=2, tensor=2, sequence_parallel=True), EVEN, {}, {}),
    "accumulated, summed each time": (Mesh(shard=RANKS), {}, {}, {"accumulate": 3, "sync": "every"}),
}


def train(model: Any, job: Job) -> None:
    """One optimizer step's forwards and backwards."""
    for number in range(1, job.accumulate + 1):
        last = number == job.accumulate
        with accumulate(model, last) if job.sync == "last" else nullcontext():
            model(**batch(), use_cache=False).loss.backward()


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with ranks(RANKS):
        yield


@pytest.mark.parametrize("case", CASES)
def test_one_rank(case: str) -> None:
    mesh, sizes, settings, of_job = CASES[case]
    model = accel.apply(tiny(**{"tie_word_embeddings": False, **sizes}), mesh=mesh, **settings)
    shape = shape_of(unspread(sizes, settings))
    job = Job(mesh=mesh, rows=2, length=TOKENS, **of_job)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    with Collectives() as counted:
        train(model, job)
    optimizer.step()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert local_bytes(iter(model.parameters())) == parameter_bytes(shape, job)
    assert local_bytes(parameter.grad for parameter in trained) == gradient_bytes(shape, job)
    states = local_bytes(state for of in optimizer.state.values() for state in of.values())
    assert states - STEP * len(trained) == optimizer_bytes(shape, job)
    expected: Counter[tuple[str, int]] = Counter()
    for flow in flows(shape, job):
        expected[flow.collective, flow.ranks] += int(flow.whole)
    if mesh.tensor > 1:  # the formula knows of no tokens that are ignored: 5 labels a row
        expected["all-gather", mesh.tensor] -= mesh.tensor * 2 * 5 * LOSS_STATISTICS
    assert counted.whole == expected


def unspread(sizes: dict[str, Any], settings: dict[str, Any]) -> Any:
    """The same model, as the command reads it: on no mesh."""
    return accel.apply(tiny(**{"tie_word_embeddings": False, **sizes}), **settings)


@pytest.mark.parametrize(
    ("mesh", "rows", "settings"),
    [
        (Mesh(shard=RANKS), 4, {}),
        (Mesh(shard=RANKS), 4, {"recompute": "selective"}),
        (Mesh(shard=RANKS, reshard=False), 4, {}),
        (Mesh(shard=RANKS), 1, {}),
    ],
    ids=["activations", "selective", "kept gathered", "weights"],
)
def test_peak(mesh: Mesh, rows: int, settings: dict[str, Any]) -> None:
    """Of a step's forward and backward, within 15 %; in float32, as torch's kernels widen where Triton's do not."""
    tokens = 128 if rows > 1 else 8
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 512}
    model = tiny(**sizes, head_dim=16, max_position_embeddings=tokens, tie_word_embeddings=False)
    job = Job(mesh=mesh, rows=rows, length=tokens, **settings)
    shape = shape_of(model)
    accel.apply(model, mesh=mesh, attention=False, **settings)
    input_ids = torch.randint(3, 512, (rows, tokens))
    inputs = {"input_ids": input_ids, "labels": input_ids, "use_cache": False}
    model(**inputs).loss.backward()
    model.zero_grad()
    given = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    with Held(*given, input_ids) as held:
        model(**inputs).loss.backward()
    phases = memory_of(shape, job).phases[:-1]
    at_rest = ("parameters", "optimizer")
    expected = max(sum(size for part, size in phase.bytes.items() if part not in at_rest) for phase in phases)
    assert expected == pytest.approx(held.peak, rel=0.15)
