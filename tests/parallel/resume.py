"""What each of four processes runs: `torchrun --nproc_per_node 4 -m tests.parallel.resume FOLDER`.

Experts over FSDP2 and tensor parallel, whose packed weights are cut twice: two steps, a checkpoint, two steps, and the model as plain
transformers loads it. The first process leaves FOLDER/losses.json.
"""

import tests.conftest  # noqa: F401, I001  # the environment of the tests, before anything of ours is imported

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import automodel_accel as accel
from automodel_accel.checkpoint import Checkpoints, export
from automodel_accel.parallel import Mesh
from tests.tiny import batch, tiny

STEPS, SAVED = 4, 2
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}


def build(mesh: Mesh | None = None) -> tuple[Any, torch.optim.Optimizer]:
    """The same in every process."""
    model = accel.apply(tiny("qwen3_moe", **EXPERTS), mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The loss of each step."""
    losses = []
    for step in steps:
        loss = model(**batch(tokens=16 + 2 * step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(folder: Path) -> None:
    """Train, save in between, and export."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    model, optimizer = build(Mesh(shard=2, tensor=2))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        losses = train(model, optimizer, range(SAVED))
        checkpoints.save(SAVED, model=model, optimizer=optimizer)
        losses += train(model, optimizer, range(SAVED, STEPS))
        checkpoints.wait()
    export(model, folder / "model")
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
