"""Examples on two processes: by torchrun, as two nodes, by accelerate; each with the losses of one process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
MULTI_GPU, TRAIN = str(EXAMPLES / "multi_gpu.py"), str(EXAMPLES / "accelerate_fsdp2" / "train.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no")


def losses(*command: str) -> list[float]:
    launched = ["env", f"PYTHONPATH={ROOT}", f"PYTHON={sys.executable}", *command]
    done = subprocess.run(launched, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(number) for number in re.findall(r"(?:loss|norm) (\d+\.\d+)", done.stdout)]


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """Losses and gradient norms of multi_gpu.py in one process."""
    return losses(sys.executable, MULTI_GPU)


def test_torchrun(alone: list[float]) -> None:
    assert len(alone) == 12
    assert losses(sys.executable, *TORCHRUN, MULTI_GPU) == pytest.approx(alone, rel=1e-5)


def test_two_nodes_on_one_machine(alone: list[float]) -> None:
    assert losses("bash", str(EXAMPLES / "slurm" / "two_nodes.sh")) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("more", [(), ("--lora",)], ids=["full", "lora"])
def test_accelerate_on_cpus(more: tuple[str, ...]) -> None:
    one = losses(sys.executable, TRAIN, *more)
    assert len(one) == 4
    assert one[-1] < one[0]
    assert losses(sys.executable, *ACCELERATE, TRAIN, *more) == pytest.approx(one, rel=1e-5)
