"""TRL's trainers on a tiny model and tiny conversations: the same code for vanilla and for ours."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import automodel_accel as accel
from tests.loops.runs import Run, weights
from tests.tiny import tiny

STEPS = 8
FRUIT = ("apple", "pear", "plum", "fig", "lime", "kiwi", "date", "peach", "melon", "grape", "mango", "quince")
COLOURS = ("green", "red", "blue", "dark")
MARKS = ("<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>")
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<assistant>"
    "{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}<user>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One number a word, fewer than the model has, and a template that marks what the assistant says."""
    text = " ".join(row["content"] for number in range(48) for row in conversation(number))
    words = [*MARKS, *sorted(set(re.findall(r"\w+|[^\w\s]", text)))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    made.chat_template = TEMPLATE
    return made


def conversation(number: int) -> list[dict[str, str]]:
    """A question and an answer of some length."""
    fruit, colour = FRUIT[number % len(FRUIT)], COLOURS[number % len(COLOURS)]
    answer = " ".join([f"a {fruit} is {colour}", *(f"and {other} too" for other in COLOURS[: number % 3])])
    return [{"role": "user", "content": f"what colour is a {fruit}"}, {"role": "assistant", "content": answer}]


def chats(count: int, start: int = 0) -> datasets.Dataset:
    """Rows of one conversation each."""
    return datasets.Dataset.from_list([{"messages": conversation(n)} for n in range(start, start + count)])


def prompts(count: int, start: int = 0) -> datasets.Dataset:
    """The same, in two parts."""
    turns = [conversation(n) for n in range(start, start + count)]
    return datasets.Dataset.from_list([{"prompt": turn[:1], "completion": turn[1:]} for turn in turns])


def preferences(count: int, start: int = 0) -> datasets.Dataset:
    """Questions with a better and a worse answer."""
    turns = [(conversation(n), conversation(n + 7)) for n in range(start, start + count)]
    return datasets.Dataset.from_list(
        [{"prompt": good[:1], "chosen": good[1:], "rejected": bad[1:]} for good, bad in turns]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a training is given beside the model.

    Attributes:
        arguments: Further arguments of the trainer's configuration.
        trainer: Further arguments of the trainer.
        rows: Makes the data.
        reference: DPO: whether a reference model is given.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    rows: Any = chats
    reference: bool = True


def model() -> Any:
    """A tiny llama, untied, that knows the tokenizer's marks."""
    return tiny(tie_word_embeddings=False, eos_token_id=3, bos_token_id=2)


def arguments(case: Case, folder: Path) -> dict[str, Any]:
    """Those of both configurations."""
    given = {
        **{"output_dir": str(folder), "use_cpu": True, "max_steps": STEPS, "bf16": False},
        **{"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 2},
        **{"learning_rate": 2e-3, "adam_epsilon": 1e-5, "lr_scheduler_type": "constant"},
        **{"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True},
    }
    return {**given, **case.arguments}


class Gradients(TrainerCallback):
    """Keeps every gradient of the first step, as the optimizer gets it."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy them."""
        if not self.first:
            named = kwargs["model"].named_parameters()
            self.first = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


@dataclass(slots=True)
class Trained:
    """What a trainer did.

    Attributes:
        trainer: The trainer.
        run: Losses as the trainer saw them, what it logged, and weights before and after.
        gradients: Of the first step.
    """

    trainer: Any
    run: Run
    gradients: dict[str, torch.Tensor]


def sft(model: nn.Module, case: Case, folder: Path, callbacks: list[TrainerCallback] | None = None) -> Any:
    """An SFTTrainer."""
    return SFTTrainer(
        model,
        SFTConfig(**arguments(case, folder)),
        train_dataset=case.rows(48),
        eval_dataset=case.rows(5, 48),
        processing_class=copy.deepcopy(tokenizer()),
        callbacks=callbacks,
        **copy.deepcopy(dict(case.trainer)),
    )


def dpo(policy: nn.Module, case: Case, folder: Path, callbacks: list[TrainerCallback] | None = None) -> Any:
    """A DPOTrainer."""
    reference = {"ref_model": model().eval()} if case.reference else {}
    return DPOTrainer(
        policy,
        args=DPOConfig(**arguments(case, folder)),
        train_dataset=preferences(48),
        eval_dataset=preferences(5, 48),
        processing_class=copy.deepcopy(tokenizer()),
        callbacks=callbacks,
        **reference,
        **copy.deepcopy(dict(case.trainer)),
    )


def train(
    make: Any, model: nn.Module, case: Case, folder: Path, callbacks: list[TrainerCallback] | None = None
) -> Trained:
    """Build the trainer and train; the model's own random numbers are the same each time."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    seen = Gradients()
    trainer = make(model, case, folder, [seen, *(callbacks or [])])
    run = Run(trainer.model)
    original = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        if trainer.model.training:
            run.saw(loss)
        return loss

    trainer.compute_loss = compute_loss
    run.start = weights(trainer.model)
    trainer.train()
    run.end = weights(trainer.model)
    logged = ("eval_loss", "mean_token_accuracy", "entropy", "eval_mean_token_accuracy", "eval_entropy", "grad_norm")
    run.seen = [{name: row[name] for name in logged if name in row} for row in trainer.state.log_history]
    return Trained(trainer, run, seen.first)


def fused(trained: Trained) -> dict[str, int]:
    """What ran by our kernels."""
    return dict(accel.report(trained.trainer.model).counts.fused)
