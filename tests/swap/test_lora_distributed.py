"""Two processes that train adapters with dropout: DDP, and FSDP2 with the adapters in shards or whole; see lora_distributed.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
WRAPS = ("DDP", "FSDP2", "FSDP2, adapters whole")
STEPS, CALLS = 4, 8  # of a step: two layers, four inputs of adapted linears each


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found, of one launch."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [*LAUNCH, "-m", "tests.swap.lora_distributed", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("wrap", WRAPS)
def test_two_processes(found: list[dict[str, Any]], wrap: str) -> None:
    """Gradients, losses and what a resumed training does are PEFT's; each process has masks of its own."""
    first, second = (rank[wrap] for rank in found)
    assert (first["problem"], second["problem"]) == ("", "")
    assert first["loss by one seed"] == second["loss by one seed"], "the same rows and the same masks"
    assert all(one != other for one, other in zip(first["losses"], second["losses"], strict=True))
    assert first["gradients"] == second["gradients"]
    assert first["fused"] == second["fused"] == STEPS * CALLS


def test_every_way_is_reported(found: list[dict[str, Any]]) -> None:
    assert tuple(found[0]) == tuple(found[1]) == WRAPS
