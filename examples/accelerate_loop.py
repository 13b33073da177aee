"""A training loop with accelerate, and one line of ours. Each label counts the same, however uneven the batches are.

python accelerate_loop.py
accelerate launch --num_processes 2 accelerate_loop.py
"""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import automodel_accel as accel

ACCUMULATED = 4  # batches in one optimizer step
IGNORED = -100  # label of a token that gives no loss
Batch = dict[str, torch.Tensor]


def build_model() -> LlamaForCausalLM:
    """A tiny Llama; any Hugging Face model: AutoModelForCausalLM.from_pretrained("...")."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, num_key_value_heads=2, **sizes))


def build_examples(number: int, tokens: int = 48) -> list[Batch]:
    """Runs of numbers, each with a prompt of another length that gives no loss."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(number):
        start, prompt = torch.randint(1, tokens, (2,), generator=generator).tolist()
        input_ids = torch.arange(start, start + tokens)
        labels = input_ids.clone()
        labels[:prompt] = IGNORED
        examples.append({"input_ids": input_ids, "labels": labels})
    return examples


def training_step(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch]
) -> torch.Tensor:
    """One optimizer step over several batches; returns the mean loss of all their labels, on all processes."""
    # the first label of each row has no token before it, so nothing predicts it
    labels = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]).sum()
    num_items_in_batch = accelerator.reduce(labels, reduction="sum")
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, 1):
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):
            loss = model(**batch, num_items_in_batch=num_items_in_batch).loss  # a sum, over the labels of all batches
            accelerator.backward(loss * accelerator.num_processes)  # as the processes' gradients are averaged
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(total, reduction="sum")


def groups(loader: DataLoader[Batch]) -> Iterator[list[Batch]]:
    """The batches of each optimizer step; the last may have fewer."""
    batches = iter(loader)
    while group := list(islice(batches, ACCUMULATED)):
        yield group


def main() -> None:
    """Train for two epochs."""
    set_seed(0)
    accelerator = Accelerator()
    model = build_model()
    accel.apply(model)  # the one line; before prepare() wraps the model
    loader = DataLoader(build_examples(64), batch_size=2, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(2):
        for step, batches in enumerate(groups(loader)):
            loss = training_step(accelerator, model, optimizer, batches)
            accelerator.print(f"epoch {epoch} step {step} loss {loss.item():.4f}")
    accelerator.print(accel.report(model))


if __name__ == "__main__":
    main()
