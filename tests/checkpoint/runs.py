"""What one rank of a test does: train a small network, save, resume, and say what it saw."""

import hashlib
import importlib
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from automodel_accel.checkpoint import CheckpointError, Checkpoints, export
from automodel_accel.checkpoint.boxes import local_part

ROWS = 8  # of all ranks together, in one step


def one_rank(function: Callable[..., Any], rank: int, world: int, folder: Path, arguments: dict[str, Any]) -> Any:
    """Call the function with torch.distributed running, if there is more than one rank."""
    if world > 1:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = function(folder, **arguments)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return found


class Network(nn.Module):
    """Two tied ends, an uneven layer, dropout, a buffer, and a frozen parameter."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.packed = nn.Linear(7, 20)
        self.norm = nn.LayerNorm(10)
        self.down = nn.Linear(10, 7)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros(3))
        self.norm.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.packed(self.dropout(self.embed(x))).chunk(2, -1)
        logits: torch.Tensor = self.head(self.down(self.norm(gate.sigmoid() * up)))
        return logits


def build(layout: str, dropout: float = 0.0) -> nn.Module:
    """The network, on the ranks there are."""
    torch.manual_seed(0)
    model: nn.Module = Network(dropout)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if layout == "fsdp2":
        return sharded(model, init_device_mesh("cpu", (world,)))
    if layout == "hsdp":
        return sharded(model, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    assert layout == "plain"
    return model


def sharded(model: nn.Module, mesh: Any) -> nn.Module:
    """FSDP2 over a layer and the rest."""
    fully_shard(model.packed, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class Position:
    """How many rows all ranks have seen together."""

    def __init__(self) -> None:
        self.rows = 0

    def next(self) -> torch.Tensor:
        """The rows of this rank, by the number of the first row of all."""
        generator = torch.Generator().manual_seed(self.rows)
        self.rows += ROWS
        rows = torch.randint(0, 13, (ROWS, 6), generator=generator)
        return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows

    def state_dict(self) -> dict[str, int]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rows = state["rows"]


class Run:
    """A model with all that trains it."""

    def __init__(self, layout: str, dropout: float = 0.0, kind: str = "AdamW", **settings: Any) -> None:
        self.model = build(layout, dropout)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [{"params": trained[:2], "weight_decay": 0.0}, {"params": trained[2:]}]
        self.optimizer = getattr(torch.optim, kind)(groups, lr=1e-2, **settings)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + 0.1 * step))
        self.data = Position()

    def state(self) -> dict[str, Any]:
        """What `save` and `load` take."""
        return {**{"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "data": self.data}}

    def step(self) -> float:
        """The loss of all rows, and a step."""
        rows = self.data.next()
        logits = self.model(rows[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        whole = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(whole)
            whole /= dist.get_world_size()
        return whole.item()

    def digest(self) -> str:
        """Of all parameters and optimizer states, whole."""
        seen = hashlib.sha256()
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        for value in (*self.model.state_dict().values(), *states):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            seen.update(whole.detach().numpy().tobytes())
        return seen.hexdigest()


@contextmanager
def opened(folder: Path, **settings: Any) -> Iterator[Checkpoints]:
    """Checkpoints beside the files of the test."""
    with Checkpoints(folder / "checkpoints", **settings) as checkpoints:
        yield checkpoints


def warm() -> None:
    """Import what a first step, a first save and a first load import."""
    importlib.import_module("torch.distributed.checkpoint.state_dict")
    importlib.import_module("torch._dynamo")
    importlib.import_module("tests.checkpoint.test_export")  # transformers and PEFT


def uninterrupted(folder: Path, layout: str, steps: int, **settings: Any) -> Any:
    """The loss and the digest of each step."""
    run = Run(layout, **settings)
    return [(run.step(), run.digest()) for _ in range(steps)]


def train_until_killed(folder: Path, layout: str, record: str) -> None:
    """Resume, and train and save without end; each line of the record is what was seen: a step, or a save that is complete."""
    run = Run(layout, dropout=0.1)
    rank = dist.get_rank() if dist.is_initialized() else 0
    with open(folder / f"{record}.{rank}", "a", buffering=1) as log, opened(folder, keep_last=2) as checkpoints:
        restored = checkpoints.load(**run.state())
        step = 0 if restored is None else restored.step
        log.write(f"resumed {step}\n")
        saved = None
        while True:
            log.write(f"step {step} {run.step().hex()} {run.digest()}\n")
            step += 1
            if step % 3 == 0:
                checkpoints.wait()
                if saved is not None:
                    log.write(f"complete {saved}\n")
                checkpoints.save(step, **run.state())
                saved = step


def save_after(folder: Path, layout: str, steps: int, **settings: Any) -> Any:
    """Train, save, train on: the losses of all steps."""
    run = Run(layout, **settings)
    losses = [run.step() for _ in range(steps)]
    with opened(folder) as checkpoints:
        checkpoints.save(steps, metrics={"loss": losses[-1]}, extra={"seen": (1, 2)}, **run.state())
        digest = run.digest()
        return losses + [run.step() for _ in range(steps)], digest


def resume(folder: Path, layout: str, steps: int, **settings: Any) -> Any:
    """Load and train on: the digest of what was loaded, and the losses."""
    run = Run(layout, **settings)
    with opened(folder) as checkpoints:
        restored = checkpoints.load(**run.state())
        assert restored is not None
        return [run.step() for _ in range(steps)], run.digest(), restored.step, restored.extra == {"seen": (1, 2)}


def layouts_agree(folder: Path) -> Any:
    """On four ranks, save under each layout and load under the next; the largest difference of any tensor from the whole."""
    found = {}
    with Checkpoints(folder / "checkpoints", keep_last=None) as checkpoints:
        for number, (name, place) in enumerate(PLACED.items()):
            whole = values(number)
            checkpoints.save(number, model=Placed(place(whole)))
            checkpoints.wait()
            for other, place_other in PLACED.items():
                target = Placed(place_other(torch.zeros_like(whole)))
                checkpoints.load(model=target, step=number)
                wanted = local_part(place_other(whole))
                found[f"{name} -> {other}"] = (local_part(target.weight) == wanted).all().item()
    return found


def values(number: int) -> torch.Tensor:
    """Each number once; rows that no number of ranks divides."""
    return torch.arange(14.0 * 5).view(14, 5) + number


class Placed(nn.Module):
    """One parameter."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def placed(*placements: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Over the mesh of 2 x 2."""
    return lambda whole: distribute_tensor(
        whole, init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor")), placements
    )


def packed(whole: torch.Tensor) -> torch.Tensor:
    """Cut over the tensor ranks, each half of the rows by itself; then by FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    rank = mesh.get_local_rank("tensor")
    local = torch.cat([half.chunk(2)[rank] for half in whole.chunk(2)])
    placements = [_StridedShard(0, split_factor=2)]
    cut = DTensor.from_local(local, mesh["tensor"], placements, shape=whole.shape, stride=whole.stride())
    module = Placed(cut)
    fully_shard(module, mesh=mesh["shard"])
    return module.weight.detach()


def column_wise(whole: torch.Tensor) -> torch.Tensor:
    """Rows over the tensor ranks, then by FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    module = Placed(distribute_tensor(whole, mesh["tensor"], [Shard(0)]))
    fully_shard(module, mesh=mesh["shard"])
    return module.weight.detach()


PLACED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda whole: whole.clone(),
    "rows": placed(Shard(0), Replicate()),
    "rows and columns": placed(Shard(0), Shard(1)),
    "FSDP2 over column-wise": column_wise,
    "FSDP2 over packed": packed,
}


def limited_file_size(folder: Path) -> str:
    """Save; then again where rank 1 may not write files of more than 100 bytes: its error."""
    run = Run("ddp")
    run.step()
    with opened(folder) as checkpoints:
        checkpoints.save(1, **run.state())
        checkpoints.wait()
        if dist.get_rank() == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        checkpoints.save(2, **run.state())
        try:
            checkpoints.wait()
        except CheckpointError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "no error"


def train_until_stopped(folder: Path, layout: str) -> int:
    """Train until a signal is agreed on: the step that was saved."""
    run, step = Run(layout), 0
    with opened(folder) as checkpoints:
        while not checkpoints.stop_requested():
            run.step()
            step += 1
            (folder / "started").touch()
        checkpoints.save(step, **run.state())
    return step


def export_sharded(folder: Path) -> None:
    """A model, its adapters, and experts, over two ranks of FSDP2."""
    from tests.checkpoint.test_export import MODELS, adapted, made

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in MODELS:
        model = made(name)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        export(fully_shard(model, mesh=mesh), folder / name, max_shard_size="20KB")
    export(fully_shard(adapted(), mesh=mesh), folder / "adapter")


def example(folder: Path, output: str, steps: int) -> None:
    """examples/resume.py."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    importlib.import_module("resume").train(Path(output), steps)
