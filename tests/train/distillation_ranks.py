"""What each of two processes runs: `torchrun --nproc_per_node 2 -m tests.train.distillation_ranks FOLDER`.

Students that are spread over two ranks, against plain ones that see all rows: the loss and every gradient. Each process leaves
what was wrong in FOLDER/<its rank>.json.
"""

import tests.conftest  # noqa: F401, I001  # the environment of the tests, before anything of ours is imported

import json
import sys
from datetime import timedelta
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import automodel_accel as accel
from automodel_accel.parallel import Mesh
from automodel_accel.train.distillation import Teacher
from tests.tiny import batch, tiny

LORA = ["q_proj", "v_proj", "down_proj"]
WEIGHT, TEMPERATURE = 0.3, 2.0
# name -> model, adapted linears, mesh, weight, whether logits are built
CASES: dict[str, tuple[str, list[str], Mesh, float, bool]] = {
    "FSDP2, llama": ("llama", [], Mesh(shard=2), WEIGHT, False),
    "FSDP2, llama, divergence alone": ("llama", [], Mesh(shard=2), 1.0, False),
    "FSDP2, qwen2 tied, LoRA": ("qwen2", LORA, Mesh(shard=2), WEIGHT, False),
    "FSDP2, gemma2": ("gemma2", [], Mesh(shard=2), WEIGHT, False),
    "DDP, llama": ("llama", [], Mesh(replicate=2), WEIGHT, False),
    "TP, llama": ("llama", [], Mesh(tensor=2), WEIGHT, True),
}


def build(kind: str, targets: list[str]) -> nn.Module:
    """The same in every process."""
    model = tiny(kind, **({"tie_word_embeddings": True} if kind == "qwen2" else {}))
    if not targets:
        return model
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def teacher() -> nn.Module:
    """Wider than the students."""
    return tiny("gemma2", hidden_size=40, final_logit_softcapping=2.0)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def problem(name: str) -> str:
    """What differs from one process, in words."""
    kind, targets, mesh, weight, builds = CASES[name]
    given = batch(rows=4)
    given["labels"][1::2, :12] = -100  # the ranks have not as many
    items = (given["labels"][:, 1:] != -100).sum()
    alone = build(kind, targets)
    expected = Teacher(teacher(), weight, TEMPERATURE).loss(alone, given, items)
    expected.backward()
    student = accel.apply(build(kind, targets), mesh=mesh)
    asked = Teacher(accel.apply(teacher()), weight, TEMPERATURE)
    data = 1 if mesh.tensor > 1 else dist.get_world_size()
    mine = {key: value[dist.get_rank() % data :: data] for key, value in given.items()}
    wrong = ""
    for _ in range(2):  # what FSDP2 keeps of a step must not change the next
        student.zero_grad()
        loss = asked.loss(student, mine, items / data)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if not torch.isclose(total / 2, expected.detach(), rtol=1e-5):
            wrong += f"loss {float(total / 2)} instead of {float(expected)}; "
        gradients = {key: whole(one.grad) for key, one in student.named_parameters() if one.grad is not None}
        for key, one in alone.named_parameters():
            if (one.grad is None) != (key not in gradients):
                wrong += f"gradient of {key}; "
            elif one.grad is not None and not (gradients[key] - one.grad).norm() <= 1e-5 * one.grad.norm():
                wrong += f"{key}: {float((gradients[key] - one.grad).norm() / one.grad.norm()):.1e}; "
    if bool(accel.report(student).materialised_logits) != builds:
        wrong += f"logits: {accel.report(student).counts.materialised}; "
    return wrong


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found = {name: problem(name) for name in CASES}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
