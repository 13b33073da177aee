"""What each of several processes runs: `torchrun --nproc_per_node 2 -m tests.parallel.scale FOLDER`, or with 4.

Six steps of two micro-batches, whose numbers of labels differ, over each mesh for that many processes, against plain transformers
on all rows in one process. The first process leaves FOLDER/found.json: for each case what was wrong (empty where nothing was).
"""

import tests.conftest  # noqa: F401, I001  # the environment of the tests, before anything of ours is imported

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import automodel_accel as accel
from automodel_accel.kernels.collectives import size_of
from automodel_accel.parallel import Mesh, Ranks, accumulate, clip_grad_norm_
from tests.tiny import VOCABULARY, tiny

STEPS, MICRO, ROWS, TOKENS = 6, 2, 4, 24
CLOSE = 1e-5  # relative, of float32 values that are summed up in another order
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = {
    "full": {},
    "full, tied": {"tied": True},
    "LoRA": {"lora": [*LINEARS, "lm_head"]},
    "LoRA, tied": {"lora": LINEARS, "tied": True},
}
MESHES: dict[int, dict[str, Mesh]] = {
    2: {
        "FSDP2": Mesh(shard=2),
        "DDP": Mesh(replicate=2),
        "TP": Mesh(tensor=2),
        "context": Mesh(context=2),
    },
    4: {
        "HSDP": Mesh(replicate=2, shard=2),
        "FSDP2 x TP": Mesh(shard=2, tensor=2),
    },
}


def cases(world: int) -> list[tuple[str, str]]:
    """Meshes and models; two models where four processes, or parts that have tests of their own, take their time."""
    few = ("full", "LoRA, tied")
    every = world == 2
    return [(way, name) for way in MESHES[world] for name in MODELS if name in few or (every and way != "context")]


@dataclass
class Trained:
    """What six steps left: losses and norms of each step, and the gradients of the first."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def build(tied: bool = False, lora: list[str] | None = None) -> tuple[nn.Module, peft.LoraConfig | None]:
    """The same in every process; adapters are drawn after it, so alike too, and change what it computes."""
    model = tiny(tie_word_embeddings=tied)
    config = None if lora is None else peft.LoraConfig(r=4, target_modules=list(lora), init_lora_weights=False)
    torch.manual_seed(3)
    return model, config


def plain(**how: Any) -> nn.Module:
    """Transformers' and PEFT's own."""
    model, config = build(**how)
    return model if config is None else peft.get_peft_model(model, config)


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and labels of a step; each row has another number of labels."""
    ids = torch.randint(3, VOCABULARY, (ROWS * MICRO, TOKENS), generator=torch.Generator().manual_seed(step))
    labels = ids.clone()
    for number, row in enumerate(labels):
        row[: 2 + (5 * number + step) % (TOKENS - 4)] = -100
    return ids, labels


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(
    model: nn.Module,
    ranks: Ranks | None = None,
    clip: Callable[..., torch.Tensor] = nn.utils.clip_grad_norm_,
    factor: Callable[[int], float] = float,
) -> Trained:
    """Six steps on this rank's rows.

    Args:
        model: Any.
        ranks: None: all rows at once.
        clip: What clips gradients.
        factor: Number of ranks with tokens of their own -> what a loss is multiplied by, as gradients are averaged over these.
    """
    size, rank, micros = (1, 0, 1) if ranks is None else (ranks.data_size, ranks.data_rank, MICRO)
    group = None if ranks is None else ranks.tokens_group
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    done = Trained()
    for step in range(STEPS):
        ids, labels = rows(step)
        items = (labels[:, 1:] != -100).sum()
        total = torch.zeros(())
        for micro in range(micros):
            mine = slice(rank + micro * size, None, size * micros)
            with accumulate(model, last=micro == micros - 1):
                loss = model(input_ids=ids[mine], labels=labels[mine], num_items_in_batch=items).loss
                (loss * factor(size_of(group))).backward()
            total += loss.detach()
        if not done.gradients:
            done.gradients = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        done.norms.append(float(clip(model.parameters(), 1.0)))
        if size_of(group) > 1:
            dist.all_reduce(total, group=group)
        done.losses.append(float(total))
        optimizer.step()
        optimizer.zero_grad()
    return done


@functools.cache
def expected(name: str) -> Trained:
    """By plain transformers, in one process."""
    return train(plain(**MODELS[name]))  # type: ignore[arg-type]


def problem(done: Trained, by: Trained) -> str:
    """What differs, in words."""
    if done.gradients.keys() != by.gradients.keys():
        return f"gradients of {done.gradients.keys() ^ by.gradients.keys()}"
    far = {name: _distance(done.gradients[name], grad) for name, grad in by.gradients.items()}
    for what in ("losses", "norms"):
        pairs = zip(getattr(done, what), getattr(by, what), strict=True)
        far[what] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    return ", ".join(f"{name}: {distance:.1e}" for name, distance in far.items() if not distance < CLOSE)


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def check(name: str, mesh: Mesh, **wrong: Any) -> dict[str, Any]:
    """One model over one mesh."""
    model, config = build(**MODELS[name])  # type: ignore[arg-type]
    ranks = mesh.ranks("cpu")
    spread = accel.apply(model, mesh=ranks, lora=config)
    report = accel.report(spread)
    done = train(spread, ranks, clip_grad_norm_, **wrong)
    return {
        "problem": problem(done, expected(name)) if dist.get_rank() == 0 else "",
        "losses": report.counts.fused["loss"],
        "logits": report.materialised_logits,
        "passed on": dict(report.counts.passed_on),
        "refused": [str(no) for fusion, no in report.refusals if fusion == "tensor"],
        "mesh": report.mesh,
    }


def main(folder: Path) -> None:
    """Run every check."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    world = dist.get_world_size()
    found = {f"{way}, {name}": check(name, MESHES[world][way]) for way, name in cases(world)}
    if world == 2:
        found["mutant: loss not multiplied"] = check("full", MESHES[2]["FSDP2"], factor=lambda size: 1.0)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
