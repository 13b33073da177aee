"""What one of several processes runs: `torchrun --standalone --nproc_per_node 2 -m tests.loops.distributed FOLDER`.

Each check trains vanilla and an applied model in the same way and compares the two. A process leaves FOLDER/rank.json: what a check
found wrong (empty where it passed), and a figure of the trained weights, which all processes must share.
"""

import tests.conftest  # noqa: F401, I001  # the environment of the tests, before anything of ours is imported

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import automodel_accel as accel
from tests.loops import runs
from tests.loops.runs import Feature, Loop, Run
from tests.swap.test_heads import HEAD, adapted
from tests.tiny import tiny

GLOO = {"ddp_backend": "gloo", "num_train_epochs": 2}


def own_steps() -> Iterator[list[runs.Batch]]:
    """The micro-batches of each step: every other row is this process's."""
    own = iter(runs.rows(count=60)[dist.get_rank() :: dist.get_world_size()])
    while chosen := list(islice(own, 4)):
        yield [runs.padded(chosen[:2])] + ([runs.padded(chosen[2:])] if chosen[2:] else [])


def train(wrapped: Any, feature: Feature, done: Run, no_sync: Callable[[], Any]) -> Run:
    """Accumulate over micro-batches; the loss is of all labels of all processes, as gradients are averaged over these."""
    optimizer = runs.adamw(wrapped)
    for batches in own_steps():
        items = runs.count_items(batches, torch.Tensor)
        dist.all_reduce(items["num_items_in_batch"])
        for number, inputs in enumerate(batches, 1):
            with nullcontext() if number == len(batches) else no_sync():
                loss = runs.compute_loss(wrapped, inputs, feature, items) * dist.get_world_size()
                done.saw(loss)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return done


def replicated(model: Any, feature: Feature, folder: Path) -> Run:
    """A loop of torch around DistributedDataParallel."""
    wrapped = nn.parallel.DistributedDataParallel(model)
    return train(wrapped, feature, Run(model), wrapped.no_sync)


def replicated_first(model: Any, feature: Feature, folder: Path) -> Run:
    """The same, applied in the wrong order, which is right nevertheless."""
    wrapped = accel.apply(nn.parallel.DistributedDataParallel(model))
    return train(wrapped, feature, Run(model), wrapped.no_sync)


def sharded(model: Any, feature: Feature, folder: Path) -> Run:
    """A loop of torch around FSDP2; gradients are reduced after every micro-batch."""
    return train(shard(model), feature, Run(model), nullcontext)


def sharded_first(model: Any, feature: Feature, folder: Path) -> Run:
    """The same, applied too late for the loss, whose head is a DTensor by then."""
    return train(accel.apply(shard(model)), feature, Run(model), nullcontext)


def shard(model: Any) -> Any:
    """Each layer, and the rest, over all processes."""
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def llama() -> Any:
    """A tiny one, untied."""
    return tiny(tie_word_embeddings=False)


def applied() -> Any:
    """The same, applied."""
    return accel.apply(llama())


def averaged(yes: bool) -> Feature:
    """The Trainer's weighting of processes with different numbers of labels."""
    return Feature(arguments={**GLOO, "average_tokens_across_devices": yes})


@dataclass(frozen=True, slots=True)
class Check:
    """Ours and vanilla's loop, what both do, and what they are given."""

    ours: tuple[Loop, Callable[[], Any]]
    vanilla: tuple[Loop, Callable[[], Any]]
    feature: Feature = field(default_factory=Feature)
    fused: bool = True

    def problem(self, done: Run, vanilla: Run) -> str:
        """What is wrong with our run, in words."""
        try:
            runs.assert_same(done, vanilla)
            if self.fused:
                runs.assert_fused(done, losses=len(done.losses) * (2 if self.feature.smoothing else 1))
        except AssertionError as wrong:
            return str(wrong) or "no words"
        return ""


def lora_last() -> Any:
    """Applied, then adapted."""
    return adapted(applied(), **HEAD)


def lora_first() -> Any:
    """Adapted, then applied."""
    return accel.apply(lora())


def lora() -> Any:
    """Adapted, on the head too."""
    return adapted(llama(), **HEAD)


OWN_LOSS = Feature(smoothing=0.1)  # from the logits of the forward that the wrapper has ended
TRAINER, ACCELERATE = runs.hf_trainer, runs.accelerate_loop
CHECKS = {
    "plain": Check((replicated, applied), (replicated, llama)),
    "plain, applied late": Check((replicated_first, llama), (replicated, llama)),
    "plain, own loss": Check((replicated, applied), (replicated, llama), OWN_LOSS),
    "fsdp2": Check((sharded, applied), (sharded, llama)),
    "fsdp2, own loss": Check((sharded, applied), (sharded, llama), OWN_LOSS),
    "fsdp2, applied late": Check((sharded_first, llama), (sharded, llama), fused=False),
    "trainer": Check((TRAINER, applied), (TRAINER, llama), averaged(True)),
    "trainer, tokens not averaged": Check((TRAINER, applied), (TRAINER, llama), averaged(False)),
    "trainer, peft": Check((TRAINER, lora_last), (TRAINER, lora), averaged(True)),
    "accelerate, peft": Check((ACCELERATE, lora_first), (ACCELERATE, lora), Feature(items=None)),
}


def main(folder: Path) -> None:
    """Run every check."""
    dist.init_process_group("gloo")
    found = {}
    for name, check in CHECKS.items():
        vanilla, done = (runs.run(loop, build(), check.feature, folder) for loop, build in (check.vanilla, check.ours))
        found[name] = {
            "problem": check.problem(done, vanilla),
            "weights": sum(float(end.double().square().sum()) for end in done.end.values()),
            "losses": sum(map(float, done.losses)),
            "fused": accel.report(done.model).counts.fused["loss"] // len(done.losses),
        }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
