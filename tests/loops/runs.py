"""Training loops as people write them: the same code runs a vanilla model and an applied one, and says how they moved.

The data is uneven on purpose: rows of different lengths, prompts that are ignored, rows without a single label, and an
accumulation at the end that is cut short. Adam's epsilon is larger than by default, as a gradient that is zero but for rounding
(a key's bias) would otherwise move a weight by a full step in a direction of chance.
"""

import copy
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import automodel_accel as accel
from automodel_accel.callback import AccelCallback
from automodel_accel.kernels.numerics import ALLOWED_RATIO, judge
from tests.tiny import VOCABULARY

STEPS, ROWS_A_BATCH, ACCUMULATION = 8, 2, 2
MICRO_BATCHES = STEPS * ACCUMULATION - 1
LEARNING_RATE, ADAM_EPSILON = 2e-3, 1e-5
LONGEST = 22
IGNORED = -100
WITHOUT_LABELS = (5, 12)
MOST_ALIKE, TINY_MOVE = 0.9999, 1e-2  # cosine of two updates; share of the largest tensor's move

Batch = dict[str, Any]
Collate = Callable[[list[dict[str, list[int]]]], Batch]


def rows(count: int = MICRO_BATCHES * ROWS_A_BATCH, seed: int = 0) -> list[dict[str, list[int]]]:
    """Token numbers and labels; prompts of one to four tokens are ignored, and two rows as a whole."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for row in range(count):
        tokens = torch.randint(3, VOCABULARY, (number(7, LONGEST + 1),), generator=generator).tolist()
        prompt = len(tokens) if row in WITHOUT_LABELS else number(1, 5)
        made.append({"input_ids": tokens, "labels": [IGNORED] * prompt + tokens[prompt:]})
    return made


def padded(chosen: list[dict[str, list[int]]], length: int = 0) -> Batch:
    """Rows padded on the right to the longest, or to a length, with an attention mask."""

    def pad(name: str, value: int) -> torch.Tensor:
        together = pad_sequence([torch.tensor(row[name]) for row in chosen], batch_first=True, padding_value=value)
        return F.pad(together, (0, max(length - together.shape[1], 0)), value=value)

    labels = pad("labels", IGNORED)
    lengths = torch.tensor([len(row["labels"]) for row in chosen])
    mask = torch.arange(labels.shape[1]) < lengths[:, None]
    return {"input_ids": pad("input_ids", 0), "labels": labels, "attention_mask": mask.long()}


def of_one_shape(chosen: list[dict[str, list[int]]]) -> Batch:
    """Rows padded to one length: torch.compile makes one graph."""
    return padded(chosen, LONGEST)


def flattened(chosen: list[dict[str, list[int]]]) -> Batch:
    """Rows laid end to end, as transformers' padding-free collator does, with what FlashAttention takes.

    Without a cache, as in the Trainer: with one, vanilla's rows see each other, and ours never do.
    """
    inputs = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(chosen, return_tensors="pt")
    return {**inputs, "use_cache": False}


def with_shift_labels(chosen: list[dict[str, list[int]]]) -> Batch:
    """Rows laid end to end, with labels that are shifted already."""
    inputs = transformers.DataCollatorWithFlattening()(chosen, return_tensors="pt")
    shifted = F.pad(inputs["labels"], (0, 1), value=IGNORED)[..., 1:]
    return {**inputs, "use_cache": False, "shift_labels": shifted}


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """What a loop does beside forward, backward and the optimizer's step.

    Attributes:
        items: How `num_items_in_batch` is given where the loop is the user's: int, torch.Tensor, or None for not at all.
        collate: How rows become a batch.
        bf16: Autocast to bfloat16.
        reentrant: Gradient checkpointing, reentrant or not; None is without.
        compiled: torch.compile, with the backend that runs the graph as it is.
        smoothing: Label smoothing: the Trainer's, or the user's own loss from logits.
        between: Called after each optimizer step with the model, the number of steps and a list for what it saw.
        arguments: Further arguments of `TrainingArguments`.
        trainer: Further arguments of `Trainer`.
    """

    items: type | None = int
    collate: Collate = padded
    bf16: bool = False
    reentrant: bool | None = None
    compiled: bool = False
    smoothing: float = 0.0
    between: Callable[[Any, int, list[Any]], None] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """What a loop did: one loss a micro-batch, what was seen between steps, and the weights before and after."""

    model: Any
    losses: list[torch.Tensor] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    end: dict[str, torch.Tensor] = field(default_factory=dict)
    nodes: set[str] = field(default_factory=set)

    def saw(self, loss: torch.Tensor) -> None:
        """Keep a loss, and the names of the nodes of its graph where there still is one."""
        self.losses.append(loss.detach().clone())
        waiting = [] if loss.grad_fn is None or self.nodes else [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node.name() not in self.nodes:
                self.nodes.add(node.name())
                waiting += [before for before, _ in node.next_functions if before is not None]

    def stepped(self, feature: Feature, step: int) -> None:
        """What a feature does between two steps."""
        if feature.between is not None:
            feature.between(self.model, step, self.seen)
            self.model.train()


Loop = Callable[[Any, Feature, Path], Run]


def run(loop: Loop, model: Any, feature: Feature, folder: Path) -> Run:
    """Train the model, which is changed, from clean states of accelerate and Dynamo."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    if feature.compiled:
        torch._dynamo.reset()
    if feature.reentrant:
        model.enable_input_require_grads()  # adapters leave the embedding frozen
    start = weights(model)
    torch.manual_seed(0)
    gc.freeze()  # the Trainer collects garbage, which takes longer than its steps among all that was imported
    try:
        done = loop(model.train(), feature, folder)
    finally:
        gc.unfreeze()
    done.start, done.end = start, weights(model)
    return done


def copied(applied: Any) -> Any:
    """A deep copy of an applied model, which takes less time than to prove one more, with the counts that both share at zero."""
    twin = copy.deepcopy(applied)
    counts = accel.report(twin).counts
    for counter in (counts.fused, counts.passed_on, counts.materialised):
        counter.clear()
    return twin


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter that is trained."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in trained.items()}


def steps(feature: Feature) -> Iterator[list[Batch]]:
    """The micro-batches of each optimizer step, in the order of the rows; the last step has only one."""
    data = iter(rows())
    while chosen := list(itertools.islice(data, ROWS_A_BATCH * ACCUMULATION)):
        halves = (chosen[at : at + ROWS_A_BATCH] for at in range(0, len(chosen), ROWS_A_BATCH))
        yield [feature.collate(half) for half in halves]


def count_items(batches: list[Batch], kind: type | None) -> Batch:
    """The keyword for the number of labels of all micro-batches of a step."""
    targets = (inputs.get("shift_labels", inputs["labels"][..., 1:]) for inputs in batches)
    items = torch.stack([(target != IGNORED).sum() for target in targets]).sum()
    return {} if kind is None else {"num_items_in_batch": items if kind is torch.Tensor else int(items)}


def compute_loss(model: Any, inputs: Batch, feature: Feature, items: Batch) -> torch.Tensor:
    """The model's own loss; or with label smoothing the user's, from the logits of a forward that was given labels."""
    outputs = model(**inputs, **items)
    if not feature.smoothing:
        return outputs.loss  # type: ignore[no-any-return]
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    total = F.cross_entropy(logits, labels, label_smoothing=feature.smoothing, reduction="sum")
    return total / items["num_items_in_batch"]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the loops that are the user's own."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, eps=ADAM_EPSILON, weight_decay=0.0
    )


def checkpoint(model: Any, feature: Feature) -> None:
    """Switch gradient checkpointing on."""
    if feature.reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": feature.reentrant})


def plain(model: Any, feature: Feature, folder: Path) -> Run:
    """A loop in torch alone."""
    done = Run(model)
    checkpoint(model, feature)
    forward = torch.compile(model, backend="eager") if feature.compiled else model
    optimizer = adamw(model)
    for step, batches in enumerate(steps(feature), 1):
        items = count_items(batches, feature.items)
        for inputs in batches:
            with torch.autocast("cpu", torch.bfloat16) if feature.bf16 else nullcontext():
                loss = compute_loss(forward, inputs, feature, items)
            done.saw(loss)
            (loss if items else loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        done.stepped(feature, step)
    return done


def accelerate_loop(model: Any, feature: Feature, folder: Path) -> Run:
    """A loop around accelerate's Accelerator."""
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=ACCUMULATION,
        mixed_precision="bf16" if feature.bf16 else "no",
        dynamo_backend="eager" if feature.compiled else "no",
    )
    done = Run(model)
    checkpoint(model, feature)
    loader = DataLoader(rows(), batch_size=ROWS_A_BATCH, collate_fn=feature.collate)  # type: ignore[arg-type]
    forward, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    items = [count_items(batches, feature.items) for batches in steps(feature)]
    for number, inputs in enumerate(loader):
        step = number // ACCUMULATION
        with accelerator.accumulate(forward):
            loss = compute_loss(forward, inputs, feature, items[step])
            done.saw(loss)
            # accelerate divides by the number of micro-batches, which num_items_in_batch has seen to already
            accelerator.backward(loss * ACCUMULATION if items[step] else loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done.stepped(feature, step + 1)
    return done


class Watched(transformers.Trainer):
    """Keeps the loss of every micro-batch, unrounded."""

    done: Run

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.done.saw(loss)
        return loss


class Between(transformers.TrainerCallback):
    """Calls what a feature does between two steps."""

    def __init__(self, done: Run, feature: Feature) -> None:
        self.done, self.feature = done, feature

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done.stepped(self.feature, state.global_step)


def arguments(feature: Feature, folder: Path, **more: Any) -> transformers.TrainingArguments:
    """The Trainer's arguments for one epoch of the rows."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": ROWS_A_BATCH,
        "per_device_eval_batch_size": ROWS_A_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": LEARNING_RATE,
        "adam_epsilon": ADAM_EPSILON,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "bf16": feature.bf16,
        "label_smoothing_factor": feature.smoothing,
    }
    if feature.reentrant is not None:
        given["gradient_checkpointing"] = True
        given["gradient_checkpointing_kwargs"] = {"use_reentrant": feature.reentrant}
    if feature.compiled:
        given |= {"torch_compile": True, "torch_compile_backend": "eager"}
    return transformers.TrainingArguments(**{**given, **feature.arguments, **more})


def make_trainer(model: Any, feature: Feature, folder: Path, **more: Any) -> Watched:
    """A Trainer over the rows; its run is in `done`."""
    trainer = Watched(
        model,
        arguments(feature, folder, **more),
        data_collator=feature.collate,
        train_dataset=rows(),
        eval_dataset=rows(5, seed=1),
        **feature.trainer,
    )
    trainer.done = Run(model)
    trainer.add_callback(Between(trainer.done, feature))
    return trainer


def hf_trainer(model: Any, feature: Feature, folder: Path) -> Run:
    """transformers' Trainer; the model was applied before it is built."""
    return watch_trainer(make_trainer(model, feature, folder))


def callback_trainer(model: Any, feature: Feature, folder: Path) -> Run:
    """transformers' Trainer with a callback that applies the model."""
    callbacks = [*feature.trainer.get("callbacks", ()), AccelCallback()]
    return watch_trainer(
        make_trainer(model, replace(feature, trainer={**feature.trainer, "callbacks": callbacks}), folder)
    )


def watch_trainer(trainer: Watched) -> Run:
    """Train, and keep what was logged of evaluations."""
    trainer.train()
    logged = ("eval_loss", "eval_metric", "eval_rows")
    trainer.done.seen += [{k: row[k] for k in logged if k in row} for row in trainer.state.log_history]
    return trainer.done


LOOPS: dict[str, Loop] = {
    "plain": plain,
    "accelerate": accelerate_loop,
    "trainer": hf_trainer,
    "callback": callback_trainer,
}
APPLYING = {"callback": "trainer"}  # a loop that applies the model that it is given, and vanilla's


@torch.no_grad()
def evaluate(model: Any) -> torch.Tensor:
    """The loss of each batch of held-out rows and the sum of its logits' squares, in evaluation mode."""
    model.eval()
    found = []
    held_out = rows(4, seed=1)
    for inputs in (padded(held_out[:2]), padded(held_out[2:])):
        outputs = model(**inputs)
        found += [outputs.loss.float(), outputs.logits.float().square().mean()]
    return torch.stack(found)


def assert_same(ours: Run, vanilla: Run) -> None:
    """In float32: each loss within 1e-5, the weights within 1e-5 of their norm, and they moved the same way, as a whole and each."""
    assert len(ours.losses) == len(vanilla.losses)
    torch.testing.assert_close(torch.stack(ours.losses), torch.stack(vanilla.losses), rtol=1e-5, atol=1e-6)
    assert_moved_alike(ours, vanilla)
    torch.testing.assert_close(ours.seen, vanilla.seen, rtol=2e-5, atol=1e-6)


def assert_as_good(ours: Run, vanilla: Run, truth: Run) -> None:
    """In bfloat16: the losses, and where the weights went, are as near to float32's as vanilla's are.

    Moves are judged by the root mean square: which single weight errs most after eight steps of Adam is chance.
    """
    losses = [torch.stack(run.losses).bfloat16() for run in (ours, vanilla)]
    assert {loss.dtype for run in (ours, vanilla) for loss in run.losses} == {torch.float32}
    verdict = judge(*losses, torch.stack(truth.losses))
    assert verdict.passed, f"losses: {verdict}"
    moves = [torch.cat([(run.end[n] - run.start[n]).flatten() for n in truth.end]) for run in (ours, vanilla, truth)]
    errors = [(move - moves[2]).square().mean().sqrt() for move in moves[:2]]
    assert errors[0] <= ALLOWED_RATIO * errors[1], errors


def assert_moved_alike(ours: Run, vanilla: Run) -> None:
    """The same weights at the end, and the same direction on the way there."""
    assert ours.end.keys() == vanilla.end.keys()
    ends = [torch.cat([end.flatten() for end in run.end.values()]).double() for run in (ours, vanilla)]
    apart = (ends[0] - ends[1]).norm() / ends[1].norm()
    assert apart <= 1e-5, f"the weights are {apart:.2g} of their norm apart"
    moves = [
        {name: (run.end[name] - run.start[name]).flatten().double() for name in run.end} for run in (ours, vanilla)
    ]
    wholes = [torch.cat(list(move.values())) for move in moves]
    largest = max(move.square().mean().sqrt() for move in moves[1].values())
    assert wholes[1].norm() > 0.01, "nothing was trained"
    assert torch.cosine_similarity(*wholes, dim=0) >= MOST_ALIKE
    for name, theirs in moves[1].items():
        if theirs.square().mean().sqrt() > TINY_MOVE * largest:
            assert torch.cosine_similarity(moves[0][name], theirs, dim=0) >= MOST_ALIKE, name


def assert_fused(done: Run, losses: int = MICRO_BATCHES, materialised: int = 0) -> None:
    """Every fusion that has a place in the model ran, the loss so many times; a matrix of runs that swap nothing proves nothing.

    Attention may hand a call on: which ones it serves depends on the model and on transformers' version.
    """
    report = accel.report(done.model)
    counts = report.counts
    assert report.places("loss") == 1
    assert counts.fused["loss"] == losses
    assert report.materialised_logits == materialised, dict(counts.materialised)
    known = ("attention: ", "linear: LoRA by PEFT: its adapters are merged or switched off")
    assert not [reason for reason in counts.passed_on if not reason.startswith(known)]
    fusions = ("norm", "mlp", "rope", "residual")
    assert not [fusion for fusion in fusions if report.places(fusion) and not counts.fused[fusion]], dict(counts.fused)
