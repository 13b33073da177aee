"""What one of several processes runs: `torchrun --standalone --nproc_per_node 2 -m tests.swap.lora_distributed FOLDER`.

Adapters with dropout, wrapped as people wrap them, ours and PEFT's alone. All processes have the same rows, so that a loss differs
between two of them by the masks alone. A process leaves FOLDER/rank.json: for each way to wrap, what was wrong (empty where
nothing was), its losses, and a figure of its adapters at the end, which all processes must share.
"""

import tests.conftest  # noqa: F401, I001  # the environment of the tests, before anything of ours is imported

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import automodel_accel as accel
from tests.budgets.layers import LINEARS
from tests.swap.compare import Step, assert_close
from tests.swap.test_wrappers import whole
from tests.tiny import batch, tiny

STEPS, RESUME_AT = 4, 2
Wrap = Callable[[Any], Any]


def adapted() -> Any:
    """PEFT's, the same in every process."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=LINEARS, lora_dropout=0.1, init_lora_weights=False)
    return peft.get_peft_model(tiny(tie_word_embeddings=False), config).train()


def data_parallel(model: Any) -> Any:
    """Every process has all of it."""
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: Any) -> Any:
    """Base and adapters in shards."""
    return _shard(model, set())


def adapters_whole(model: Any) -> Any:
    """The base in shards; every process has all adapters."""
    return _shard(model, _adapters(model))


def _shard(model: Any, ignored: set[nn.Parameter]) -> Any:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in (*model.get_base_model().model.layers, model):
        fully_shard(unit, mesh=mesh, ignored_params=ignored)
    return model


def _adapters(model: Any) -> set[nn.Parameter]:
    return {parameter for name, parameter in model.named_parameters() if "lora_" in name}


WRAPS: dict[str, Wrap] = {"DDP": data_parallel, "FSDP2": sharded, "FSDP2, adapters whole": adapters_whole}


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, eps=1e-5)


def one_step(model: Any, optimizer: torch.optim.Optimizer, number: int, seed: int) -> Step:
    """Forward, backward, and a step; what is not in shards and not in DDP is averaged here, as a user would."""
    optimizer.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch(ignored=3 + number)).loss
    loss.backward()
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        if not isinstance(parameter, DTensor) and not isinstance(model, nn.parallel.DistributedDataParallel):
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    grads = {name: p.grad.detach().clone() for name, p in trained.items() if p.grad is not None}
    optimizer.step()
    return whole(Step(loss.detach(), grads))


def train(model: Any, wrap: Wrap, build: Callable[[], Any], resume: bool = False) -> list[Step]:
    """Steps with masks of each process's own; with `resume`, the later ones by a new model that takes over the state."""
    wrapped = wrap(model)
    optimizer = optimizer_of(wrapped)
    found = []
    for number in range(STEPS):
        if resume and number == RESUME_AT:
            state = copy.deepcopy(get_state_dict(wrapped, optimizer))
            wrapped = wrap(build())
            optimizer = optimizer_of(wrapped)
            set_state_dict(wrapped, optimizer, model_state_dict=state[0], optim_state_dict=state[1])
        found.append(one_step(wrapped, optimizer, number, seed=10 * dist.get_rank() + number))
    return found


def problem(ours: list[Step], theirs: list[Step], resumed: list[Step]) -> str:
    """What is wrong, in words. Later steps start from weights that differ by rounding already: their losses are compared."""
    try:
        assert_close(ours[0], theirs[0])
        for steps in (ours, resumed):
            torch.testing.assert_close(_losses(steps), _losses(theirs), rtol=1e-5, atol=1e-5)
    except AssertionError as wrong:
        return str(wrong) or "no words"
    return ""


def _losses(steps: list[Step]) -> torch.Tensor:
    return torch.stack([step.loss for step in steps])


def applied() -> Any:
    """Ours."""
    return accel.apply(adapted())


def main(folder: Path) -> None:
    """Run every check."""
    dist.init_process_group("gloo")
    found = {}
    for name, wrap in WRAPS.items():
        model = applied()
        ours, theirs = train(model, wrap, applied), train(adapted(), wrap, adapted)
        fused = accel.report(model).counts.fused["linear"]
        resumed = train(applied(), wrap, applied, resume=True)
        gradients = sum(float(grad.double().square().sum()) for step in ours for grad in step.gradients.values())
        same_seed = one_step(wrap(applied()), optimizer_of(nn.Linear(1, 1)), 0, seed=7)
        found[name] = {
            "problem": problem(ours, theirs, resumed),
            "losses": _losses(ours).tolist(),
            "loss by one seed": float(same_seed.loss),
            "gradients": gradients,
            "fused": fused,
        }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
