"""What one of two processes runs: `torchrun --standalone --nproc_per_node 2 -m tests.swap.fp8_distributed FOLDER`.

FP8 linears under FSDP2, their weights gathered in 8 bits, against the same gathered as they are, and against one process. Each
process leaves FOLDER/rank.json: for each check, what was wrong (empty where nothing was), and figures.
"""

import tests.conftest  # noqa: F401, I001  # the environment of the tests, before anything of ours is imported

import copy
import functools
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import automodel_accel as accel
from automodel_accel.kernels.fp8_linear import Recipe, fp8_linears, sharded
from automodel_accel.kernels.fp8_linear.weights import HeldCast
from tests.tiny import batch, tiny

H, LAYERS, STEPS, MICRO = 32, 2, 4, 2
ROWS = LAYERS * (H + 16 + 16 + H)  # of the weights of the linears
OTHERS = LAYERS * 3 * H  # elements of what else is gathered: norms and a bias
ALL_GATHER, ALL_REDUCE = "c10d._allgather_base_.default", "c10d.allreduce_.default"


class Block(nn.Module):
    """Three linears of one input, and one of another."""

    def __init__(self, held: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.q, self.k, self.v = nn.Linear(H, H), nn.Linear(H, 16, bias=False), nn.Linear(H, 16, bias=False)
        self.o = nn.Linear(H, H, bias=False)
        self.recipe: Recipe | None = Recipe()  # None: the plain linears
        self.held = [HeldCast() if held else None for _ in range(2)]

    def groups(self) -> list[list[nn.Linear]]:
        """Linears of one input."""
        return [[self.q, self.k, self.v], [self.o]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, H]."""
        q, k, v = self._linears(self.norm(x), 0)
        (o,) = self._linears(q * torch.cat((k, v), -1), 1)
        return x + o

    def _linears(self, x: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
        linears = self.groups()[number]
        if self.recipe is None:
            return tuple(nn.functional.linear(x, linear.weight, linear.bias) for linear in linears)
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        return fp8_linears(x, weights, biases, self.recipe, held=self.held[number])


class Blocks(nn.Sequential):
    """One after the other."""

    checkpointed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, H]."""
        for block in self:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


@dataclass(frozen=True)
class Run:
    """How a model is trained.

    Attributes:
        recipe: How values are rounded.
        gathered: What becomes of the weights: "8 bits", "plain", or "whole": no FSDP2, on each process alone.
        dtype: Of the parameters.
        mixed: Whether they are computed with in bfloat16.
        own_rows: Whether each process has rows of its own.
        micro: Micro-batches of a step.
        held: Whether casts are held.
        checkpointed: Whether blocks are computed again in backward.
        frozen: Whether the weights of the linears do not train.
        hybrid: Whether the mesh has a dimension of replicas too.
        reshard: Whether FSDP2 frees what it gathered between forward and backward.
    """

    recipe: Recipe
    gathered: str = "8 bits"
    dtype: torch.dtype = torch.float32
    mixed: bool = False
    own_rows: bool = True
    micro: int = 1
    held: bool = False
    checkpointed: bool = False
    frozen: bool = False
    hybrid: bool = False
    reshard: bool = True


class Wire(TorchDispatchMode):
    """Counts calls of collectives, and the bytes that a process gives to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := str(func)).startswith("c10d."):
            given = args[1] if name == ALL_GATHER else args[0]
            self.calls[name] += 1
            self.bytes[name] += sum(t.nbytes for t in (given if isinstance(given, (list, tuple)) else [given]))
        return func(*args, **(kwargs or {}))


def build(run: Run) -> nn.Sequential:
    """The same in every process; rows of the last one are larger, so that no scale of a part is that of the whole."""
    torch.manual_seed(0)
    model = Blocks(*(Block(run.held) for _ in range(LAYERS))).to(run.dtype)
    model.checkpointed = run.checkpointed
    for block in model:
        block.recipe = run.recipe
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter[len(parameter) // 2 :] *= 5 if "k." in name else 3
            parameter.requires_grad_(parameter.dim() == 1 or not run.frozen)
    if run.gathered == "whole":
        return model
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if run.mixed else MixedPrecisionPolicy()
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh_of(run.hybrid), mp_policy=policy, reshard_after_forward=run.reshard)
    if run.gathered == "8 bits":
        sharded.gather_in_8_bits(weights_of(model), run.recipe.rowwise)
    return model


@functools.cache
def mesh_of(hybrid: bool) -> Any:
    """Of all processes; `hybrid`: with a dimension of replicas."""
    names = ("replicas", "rows") if hybrid else ("rows",)
    return dist.init_device_mesh("cpu", (1, dist.get_world_size())[-len(names) :], mesh_dim_names=names)


def weights_of(model: nn.Sequential) -> list[list[torch.Tensor]]:
    """In groups of one input."""
    return [[linear.weight for linear in group] for block in model for group in block.groups()]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Whose steps change the scales."""
    return torch.optim.AdamW(model.parameters(), lr=0.3)


def rows(run: Run, number: int) -> torch.Tensor:
    """Of one micro-batch."""
    seed = 1 + number + (100 * dist.get_rank() if run.own_rows else 0)
    return torch.randn(24, H, generator=torch.Generator().manual_seed(seed)).to(run.dtype)


def train(run: Run, model: Any) -> list[torch.Tensor]:
    """Losses of each micro-batch, and the parameters at the end."""
    optimizer, found = optimizer_of(model), []
    for number in range(STEPS):
        for micro in range(run.micro):
            if run.gathered != "whole":
                model.set_requires_gradient_sync(micro == run.micro - 1)
            x = rows(run, run.micro * number + micro)
            x = x.bfloat16() if run.mixed else x
            loss = model(x).float().square().mean()
            loss.backward()
            found.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return found + parameters(model)


def parameters(model: nn.Module) -> list[torch.Tensor]:
    """Whole."""
    return [whole(p.detach()) for p in model.parameters()]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's values, all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    """Which differ, bit for bit."""
    differ = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(a, b)]
    return f"differ: {differ} of {len(ours)}" if differ else ""


RECIPES = {"tensorwise": Recipe(), "rowwise": Recipe(rowwise=True)}
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "mixed": {"mixed": True},
    "accumulated": {"micro": MICRO},
    "checkpointed": {"checkpointed": True},
    "frozen": {"frozen": True},
    "hybrid": {"hybrid": True},
    "kept": {"reshard": False, "wide": True},
}


def as_plain(recipe: Recipe, way: dict[str, Any]) -> dict[str, Any]:
    """Gathered in 8 bits, a training has the bits of one that gathers the weights as they are; what went over the wire."""
    run = Run(replace(recipe, wide_gradients=way.get("wide", False)), **{k: v for k, v in way.items() if k != "wide"})
    with Wire() as ours:
        bits = train(run, build(run))
    plain = replace(run, gathered="plain")
    with Wire() as theirs:
        expected = train(plain, build(plain))
    return {
        "problem": same(bits, expected),
        "scales": ours.calls[ALL_REDUCE] - theirs.calls[ALL_REDUCE],
        "gathers": [wire.calls[ALL_GATHER] for wire in (ours, theirs)],
        "gathered": [wire.bytes[ALL_GATHER] for wire in (ours, theirs)],
    }


def as_one_process(recipe: Recipe) -> dict[str, Any]:
    """With the same rows everywhere, a training in shards has the bits of one in one process."""
    run = Run(recipe, own_rows=False)
    alone = replace(run, gathered="whole")
    return {"problem": same(train(run, build(run)), train(alone, build(alone)))}


def mutant(recipe: Recipe, *mistakes: Any) -> dict[str, Any]:
    """What the comparison says of a mistake."""
    with ExitStack() as stack:
        for mistake in mistakes:
            stack.enter_context(mistake)
        return {"problem": as_plain(recipe, {})["problem"]}


def checkpoints(recipe: Recipe) -> dict[str, Any]:
    """Names, dtypes and values of a state_dict are as without, in training too; loading one is seen by the next forward.

    Parameters themselves can be saved, and converted: then they are gathered as they are.
    """
    run = Run(recipe)
    model, plain = build(run), build(replace(run, gathered="plain"))
    train(run, model)
    train(replace(run, gathered="plain"), plain)
    state, expected = copy.deepcopy(model.state_dict()), plain.state_dict()
    kinds = [{k: (type(v), v.dtype, v.placements) for k, v in one.items()} for one in (state, expected)]
    problem = same([v.full_tensor() for v in state.values()], [v.full_tensor() for v in expected.values()])
    names = [name for v in state.values() for name in vars(v._local_tensor)]
    torch.save((state, dict(model.named_parameters())), file := io.BytesIO())
    new = build(replace(run, gathered="plain"))
    again, parameters = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    new.load_state_dict(again)
    problem += same(list(parameters.values()), list(new.parameters()))
    x, other = rows(run, 0), build(replace(run, gathered="plain"))
    problem += same([model(x), new(x)], [plain(x), plain(x)])
    model.load_state_dict(other.state_dict())
    problem += same([model(x)], [other(x)])
    fresh = [build(replace(run, gathered=how)).bfloat16() for how in ("8 bits", "plain")]
    problem += same(*([one(x.bfloat16())] for one in fresh))
    return {"problem": problem, "kinds": kinds[0] == kinds[1], "attributes": names}


def changed_without_a_step(recipe: Recipe) -> dict[str, Any]:
    """A parameter that is written to is gathered as it is then; a NaN in the rows of one process reaches all."""
    run = Run(recipe, own_rows=False)
    model, plain = build(run), build(replace(run, gathered="plain"))
    x, problem = rows(run, 0), ""
    for factor in (4.0, 0.3):
        for one in (model, plain):
            model(x)
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter.mul_(factor)
        problem += same([model(x)], [plain(x)])
    model[0].q.weight._local_tensor[3, 5] *= float("nan") if dist.get_rank() else 1.0
    nan = model(x).isnan()
    return {"problem": problem, "nan": bool(nan.all() if not recipe.rowwise else nan.any())}


def read_by_others(recipe: Recipe) -> dict[str, Any]:
    """To any other operation the weight is the values that its bytes stand for, with a gradient; none writes to it."""
    run = Run(recipe)
    model = build(run)
    for block in model:
        block.recipe = None
    seen: list[Any] = []

    def look(linear: nn.Module, *_: Any) -> None:
        weight: Any = linear.weight
        seen.append((weight, weight * 1, weight.dtype))

    model[0].norm.register_forward_hook(lambda *_: look(model[0].q))
    model(rows(run, 0)).square().mean().backward()
    weight, values, dtype = seen[0]
    exact = whole(build(replace(run, gathered="plain"))[0].q.weight)
    error = float((values.detach() - exact).abs().max() / exact.abs().max())
    grads = all(p.grad is not None for p in model.parameters())
    return {"kind": type(weight).__name__, "dtype": str(dtype), "error": error, "grads": grads, "write": raised(weight)}


def raised(weight: torch.Tensor) -> str:
    """What an in-place write says."""
    try:
        weight.detach().mul_(2)
    except RuntimeError as error:
        return str(error)
    return ""


def held_under_plain(recipe: Recipe) -> dict[str, Any]:
    """Casts that are held of weights that FSDP2 gathers as they are: steps of an optimizer are seen; all casts are kept."""
    run = Run(recipe, gathered="plain", held=True)
    alone = replace(run, held=False)
    model, plain = build(run), build(alone)
    problem = same(train(run, model), train(alone, plain))
    casts = [held.cast for block in model for held in block.held]
    kept = sum(t.nbytes for cast in casts for t in (cast.q, cast.q_t) if t is not None)
    return {"problem": problem, "bytes": kept}


def applied(recipe: str) -> dict[str, Any]:
    """Models of transformers, applied, sharded and gathered in 8 bits, and the same gathered as they are."""
    found: list[list[torch.Tensor]] = []
    wire: list[int] = []
    for in_8_bits in (True, False):
        model: Any = accel.apply(tiny(), fp8=recipe)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh_of(False))
        fully_shard(model, mesh=mesh_of(False))
        refused = accel.gather_fp8(model) if in_8_bits else []
        assert not refused, refused
        optimizer, losses = optimizer_of(model), []
        with Wire() as watched:
            for _ in range(STEPS):
                loss = model(**batch(tokens=16 + dist.get_rank())).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        wire.append(watched.bytes[ALL_GATHER])
        found.append([*losses, *parameters(model)])
        assert not accel.report(model).counts.passed_on, accel.report(model).counts.passed_on
    late = said(lambda: accel.gather_fp8(accel.apply(tiny(), fp8=recipe)))
    return {"problem": same(*found), "wire": wire, "late": late, "unapplied": said(lambda: accel.gather_fp8(tiny()))}


def refusals() -> dict[str, Any]:
    """What cannot be, in words."""
    run = Run(Recipe())
    model = build(replace(run, gathered="plain"))
    plain = build(replace(run, gathered="whole"))
    odd, norm = fully_shard(nn.Linear(16, 33), mesh=mesh_of(False)).weight, model[0].norm.weight
    early = sharded.gather_in_8_bits(weights_of(model), rowwise=False)
    early()
    attributes = [name for group in weights_of(model) for weight in group for name in vars(weight._local_tensor)]
    late = sharded.gather_in_8_bits(weights_of(model), rowwise=False)
    model(rows(run, 0))
    x = rows(run, 0)
    return {
        "plain": said(lambda: sharded.gather_in_8_bits([[plain[0].q.weight]], False)),
        "odd": said(lambda: sharded.gather_in_8_bits([[odd]], False)),
        "vector": said(lambda: sharded.gather_in_8_bits([[norm]], False)),
        "late": said(late),
        "left": attributes,
        "DTensor": said(lambda: fp8_linears(x, [model[0].q.weight], [None])),
    }


def said(call: Callable[[], Any]) -> str:
    """The words of a ValueError, or nothing."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


@contextmanager
def processes() -> Iterator[None]:
    """The two."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    yield
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """Run every check."""
    found: dict[str, Any] = {}
    with processes():
        for name, recipe in RECIPES.items():
            found.update({f"{name}, {way}": as_plain(recipe, how) for way, how in WAYS.items()})
            found[f"{name}, one process"] = as_one_process(recipe)
            found[f"{name}, checkpoints"] = checkpoints(recipe)
            found[f"{name}, changed"] = changed_without_a_step(recipe)
            found[f"{name}, others"] = read_by_others(recipe)
            found[f"{name}, held"] = held_under_plain(recipe)
            found[f"{name}, applied"] = applied(name)
        found["stale"] = mutant(Recipe(), mock.patch.object(sharded, "_state", return_value=(0,)))
        found["of a part"] = mutant(Recipe(), mock.patch.object(sharded.distributed, "all_reduce"))
        found["refusals"] = refusals()
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
