"""What one of two processes runs: `torchrun --standalone --nproc_per_node 2 -m tests.parallel.context_ranks FOLDER`.

Each check compares with one process and plain transformers, and says what is wrong (empty where nothing is); a mutant is the same
check with a mistake in the code under test, which it must find. A process leaves FOLDER/rank.json: check -> problem.
"""

import tests.conftest  # noqa: F401, I001  # the environment of the tests, before anything of ours is imported

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import fully_shard

import automodel_accel as accel
from automodel_accel.kernels.collectives import gather_from
from automodel_accel.parallel import context, context_attention, context_rows, tokens
from automodel_accel.parallel.in_backward import step_in_backward
from automodel_accel.parallel.mesh import Mesh, Ranks
from automodel_accel.parallel.sync_count import count_syncs
from automodel_accel.parallel.tokens import StepSums
from tests.parallel.test_loop_syncs import FOR_A_CPU
from tests.swap.compare import Step, assert_as_good, assert_close, gradients, step
from tests.tiny import batch, tiny

Batch = dict[str, torch.Tensor]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}


def packed(length: int = 22) -> Batch:
    """Two documents a row, which end at different places, in both ranks' parts."""
    positions = [torch.cat([torch.arange(first), torch.arange(length - first)]) for first in (7, 13)]
    return {**batch(2, length, 0), "position_ids": torch.stack(positions)}


def padded(side: str, length: int = 23) -> Batch:
    """One padded row."""
    given = batch(2, length, 3)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, slice(0, 5) if side == "left" else slice(-6, None)] = 0
    given["labels"] = given["labels"].masked_fill(mask == 0, -100)
    return {**given, "attention_mask": mask}


def averaged(done: Step) -> Step:
    """Over the ranks, as FSDP2 and DDP do it."""
    for tensor in (done.loss, *done.gradients.values()):
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return done


def cut_step(model: nn.Module, given: Batch, ranks: Ranks, **more: Any) -> Step:
    """A step of a model that is cut."""
    context.cut(model, ranks)
    return averaged(step(model, **given, **more))


def same(name: str, given: Batch, ranks: Ranks, config: Mapping[str, Any] | None = None, **settings: Any) -> None:
    """In float32, the loss and every gradient are vanilla's; so they are where the number of labels is given."""
    vanilla = step(tiny(name, **(config or {})), **given, use_cache=False)
    model = tiny(name, **(config or {}))
    model = model if settings.pop("plain", False) else accel.apply(model, **settings)
    assert_close(cut_step(model, given, ranks), vanilla)
    items = (given["labels"][:, 1:] != -100).sum() / dist.get_world_size()
    assert_close(averaged(step(model, **given, num_items_in_batch=items)), vanilla)
    whole, theirs = model(given["input_ids"]).logits, tiny(name, **(config or {}))(given["input_ids"]).logits
    torch.testing.assert_close(whole, theirs, rtol=1e-5, atol=1e-5)  # nothing is cut without labels


def no_waits(ranks: Ranks) -> None:
    """After the first step, whose probe waits, no step does, but for a CPU."""
    model = accel.apply(tiny("llama"))
    context.cut(model, ranks)
    step(model, **batch(2, 21, 5))
    with count_syncs() as syncs:
        step(model, **batch(2, 21, 4))
    assert {sync.place.split()[-1] for sync in syncs} == FOR_A_CPU, syncs


def as_good_in_bfloat16(ranks: Ranks) -> None:
    """The errors are vanilla's, against float64."""
    given = packed()
    truth = step(tiny("llama", torch.float64), **given, use_cache=False)
    vanilla = step(tiny("llama", torch.bfloat16), **given, use_cache=False)
    done = cut_step(accel.apply(tiny("llama", torch.bfloat16)), given, ranks)
    assert_as_good(done, vanilla, truth, torch.bfloat16)


def adapted(ranks: Ranks) -> None:
    """LoRA by PEFT around the model that is cut."""
    torch.manual_seed(3)
    vanilla = accel.apply(tiny("llama"), lora=LORA, norm=False, mlp=False, rope=False, attention=False, loss=False)
    expected = step(vanilla, **packed(), use_cache=False)
    torch.manual_seed(3)
    assert_close(cut_step(accel.apply(tiny("llama"), lora=LORA), packed(), ranks), expected)


def sharded(ranks: Ranks) -> None:
    """FSDP2 over the shard and context axes averages the gradients to those of the whole rows."""
    model = accel.apply(tiny("llama", tie_word_embeddings=False))
    context.cut(model, ranks)
    shard(model, ranks)
    given = padded("right")
    loss = model(**given).loss
    loss.backward()
    whole = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    dist.all_reduce(loss := loss.detach())
    assert_close(Step(loss / 2, whole), step(tiny("llama", tie_word_embeddings=False), **given))


def shard(model: Any, ranks: Ranks) -> Any:
    """Each layer, and the rest."""
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=ranks.flat("shard", "context"))
    return model


def refused(words: str, act: Callable[[], Any]) -> None:
    """A ValueError that says so."""
    said = "nothing"
    try:
        act()
    except ValueError as error:
        said = str(error)
    assert words in said, f"{said}; expected: {words}"


def different_rows(ranks: Ranks) -> None:
    """Each rank has rows of its own, as if it were one of data."""
    model = tiny("llama")
    context.cut(model, ranks)
    given = batch(2, 24, 5)
    given["input_ids"] = given["input_ids"] + dist.get_rank()
    refused("different rows", lambda: model(**given))


@contextmanager
def mistake(place: Any, name: str, wrong: Any) -> Iterator[None]:
    """In the code under test."""
    with mock.patch.object(place, name, wrong):
        yield


def found(check: Callable[[], Any]) -> None:
    """The check fails."""
    try:
        check()
    except AssertionError:
        return
    raise AssertionError("the mistake was not found")


def no_offset(mask: Any, start: int, rows: Any, device: torch.device) -> torch.Tensor:
    """Each piece as if it were the first."""
    return torch.ones(1, 1, rows.piece, rows.piece, dtype=torch.bool, device=device).tril()


def contiguous_starts(rows: Any) -> tuple[int, int]:
    """Pieces in an order other than that in which they are put together."""
    return 2 * rows.rank * rows.piece, (2 * rows.rank + 1) * rows.piece


def shifted_late(given: Mapping[str, Any], shape: torch.Size) -> torch.Tensor:
    """Labels that nobody shifted."""
    return given["labels"]


def per_rank(own: Callable[..., Any], given: Mapping[str, Any], running: Any) -> dict[str, Any]:
    """A mean over this rank's labels."""
    cut = own(given, running)
    return {**cut, "num_items_in_batch": (cut["shift_labels"] != -100).sum()}


MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "the mask has no offset": (context_attention, "_visible", no_offset),
    "pieces in another order": (context_rows.Rows, "starts", property(contiguous_starts)),
    "gradients of keys and values are not summed": (context_rows, "gather_to", gather_from),
    "labels are not shifted before the cut": (context, "_shifted", shifted_late),
    "the mean over a rank's own labels": (context, "_own", lambda *args, own=context._own: per_rank(own, *args)),
}


def own_batches() -> list[Batch]:
    """Two micro-batches of this rank, with far fewer labels on the second one."""
    ignored = (5, 3) if dist.get_rank() == 0 else (20, 17)
    return [batch(2, 24, count) for count in ignored]


def counted(ranks: Ranks, factor: float = 1.0) -> None:
    """Unequal numbers of labels: gradients averaged by DDP, and the reported loss, are those of all rows in one process."""
    batches = [batch(2, 24, count) for count in (5, 3, 20, 17)]
    labels = sum(int((given["labels"][:, 1:] != -100).sum()) for given in batches)
    vanilla = tiny("llama")
    losses = [vanilla(**given, num_items_in_batch=torch.tensor(labels)).loss for given in batches]
    torch.stack(losses).sum().backward()
    model = tiny("llama")
    wrapped = nn.parallel.DistributedDataParallel(model)
    sums = StepSums(ranks, "cpu")
    begun = sums.begin(own_batches())
    assert begun.before is None
    for number, given in enumerate(own_batches()):
        with wrapped.no_sync() if number == 0 else nullcontext():
            loss = wrapped(**given, num_items_in_batch=begun.items * factor).loss
            loss.backward()
        sums.add(loss)
    sums.note(stop=dist.get_rank() == 1, lines=3)
    assert_close(Step(torch.stack(losses).sum(), gradients(model)), Step(torch.stack(losses).sum(), gradients(vanilla)))
    figures = sums.begin(own_batches()).before
    assert figures is not None
    read = figures.read()
    expected = {"loss": float(sum(losses)), "tokens": labels, "stop": 1, "lines": 6}
    assert read.keys() == expected.keys()
    assert all(abs(read[name] - value) <= 1e-6 * value for name, value in expected.items()), (read, expected)


def counted_once(ranks: Ranks) -> None:
    """Ranks of the context axis are given the same rows, whose labels are counted once; their shares of the loss add up."""
    given = batch(2, 23, 5)
    model = tiny("llama")
    context.cut(model, ranks)
    sums = StepSums(ranks, "cpu")
    begun = sums.begin([given])
    assert begun.tokens.item() == (given["labels"][:, 1:] != -100).sum()
    done = step(model, **given, num_items_in_batch=begun.items)
    sums.add(done.loss)
    assert_close(averaged(done), vanilla := step(tiny("llama"), **given))
    figures = sums.end()
    assert figures is not None
    assert abs(figures.read()["loss"] - vanilla.loss.item()) < 1e-6


def in_backward(make: Callable[..., torch.optim.Optimizer], ranks: Ranks) -> None:
    """Under FSDP2, three steps end with the same bits as steps after backward; states are the same."""
    ends = []
    for inside in (False, True):
        model = shard(tiny("llama"), ranks)
        optimizer = make(model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 0.5**number)
        if inside:
            step_in_backward(optimizer, model)
        for number in range(3):
            model(**batch(2, 24, 5 + number + dist.get_rank())).loss.backward()
            assert not inside or all(p.grad is None for p in model.parameters())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ends.append([*(p.full_tensor() for p in model.parameters()), *numbers(optimizer.state_dict()["state"])])
    assert len(ends[0]) == len(ends[1])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def numbers(state: Mapping[int, Mapping[str, Any]]) -> list[torch.Tensor]:
    """All tensors of an optimizer's state, whole."""
    found = [value for number in sorted(state) for _, value in sorted(state[number].items())]
    return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in found if value is not None]


def copies(ranks: Ranks) -> None:
    """Copies of a model, by either of torch's wrappers, keep all gradients."""
    for model in (replicate(tiny("llama")), nn.parallel.DistributedDataParallel(tiny("llama"))):
        optimizer = torch.optim.AdamW(model.parameters())
        refused("keeps all gradients in buckets", lambda: step_in_backward(optimizer, model))  # noqa: B023


def clipped(ranks: Ranks) -> None:
    """Each parameter's gradient is clipped by its whole norm, not by that of a rank's part."""
    vanilla, model = tiny("llama"), shard(tiny("llama"), ranks)
    for one in (vanilla, model):
        optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
        if one is model:
            step_in_backward(optimizer, one, clip_each=0.01)
        one(**batch()).loss.backward()
        if one is vanilla:
            for parameter in one.parameters():
                nn.utils.clip_grad_norm_([parameter], 0.01)
        optimizer.step()
    for (name, theirs), ours in zip(vanilla.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-5, atol=1e-6, msg=name)


def checks(cut: Ranks, data: Ranks) -> dict[str, Callable[[], Any]]:
    """Name -> what raises an AssertionError where something is wrong."""
    windows = {"sliding_window": 6}
    mutants = {
        f"mutant: {name}": lambda wrong=wrong: found(lambda: mistaken(wrong, cut)) for name, wrong in MISTAKES.items()
    }
    return {
        "llama, plain": lambda: same("llama", batch(2, 24, 5), cut, plain=True),
        "llama, padded left": lambda: same("llama", padded("left"), cut, plain=True),
        "llama, packed": lambda: same("llama", packed(), cut, recompute="full"),
        "llama, five tokens": lambda: same("llama", batch(3, 5, 0), cut, plain=True),
        "qwen3": lambda: same("qwen3", batch(2, 21, 5), cut, recompute="selective"),
        "mistral, windows": lambda: same("mistral", packed(), cut, windows),
        "gemma2, soft-caps": lambda: same("gemma2", padded("left"), cut, windows),
        "llama, bfloat16": lambda: as_good_in_bfloat16(cut),
        "llama, adapted": lambda: adapted(cut),
        "llama, FSDP2": lambda: sharded(cut),
        "no waits": lambda: no_waits(cut),
        "different rows": lambda: different_rows(cut),
        **mutants,
        "tokens": lambda: counted(data),
        "mutant: tokens without the factor": lambda: found(lambda: counted(data, factor=2.0)),
        "mutant: tokens of one rank": lambda: found(lambda: of_one_rank(data)),
        "tokens, cut": lambda: counted_once(cut),
        "in backward, AdamW": lambda: in_backward(lambda p: torch.optim.AdamW(p, lr=1e-2), data),
        "in backward, SGD": lambda: in_backward(lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9), data),
        "in backward, clipped": lambda: clipped(data),
        "in backward, copies": lambda: copies(data),
    }


def mistaken(wrong: tuple[Any, str, Any], ranks: Ranks) -> None:
    """A check that passes without the mistake."""
    with ExitStack() as stack:
        stack.enter_context(mistake(*wrong))
        same("llama", packed(), ranks, plain=True)


def of_one_rank(ranks: Ranks) -> None:
    """Nobody sums."""
    with mistake(tokens.dist, "all_reduce", lambda packed, group, async_op: None):
        counted(ranks)


def main(folder: Path) -> None:
    """Run every check."""
    dist.init_process_group("gloo")
    cut, data = Mesh(context=2).ranks("cpu"), Mesh(shard=2).ranks("cpu")
    problems = {}
    for name, check in checks(cut, data).items():
        try:
            check()
            problems[name] = ""
        except AssertionError as wrong:
            problems[name] = str(wrong) or "no words"
        dist.barrier()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(problems))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
