"""Chat rows: read them, and turn them into tokens with the loss on the assistant's answers alone.

A row is a conversation, a list of {"role": ..., "content": ...}, as in the column "messages" of chat datasets.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from automodel_accel.demo.chatterbot import Row, question_and_answer

SHAPES = '{"messages": [{"role": "user", "content": "..."}, ...]} or {"prompt": "...", "completion": "..."}'
IGNORED = -100  # the label that the loss leaves out


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens of a prompt and its answer; the labels are IGNORED on the prompt and the tokens on the answer."""

    input_ids: list[int]
    labels: list[int]


def read_rows(path: Path) -> list[Row]:
    """Read a JSONL file: in each line a chat row or a prompt with its completion.

    Raises:
        ValueError: no such file, or a line of neither shape; names file and line.
    """
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file; expected JSONL, in each line {SHAPES}.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--data {path}: byte {error.start} is not UTF-8; expected a text file of JSON lines."
        ) from error
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, where: str) -> Row:
    try:
        came = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}); expected {SHAPES}.") from error
    if not isinstance(came, dict):
        raise ValueError(f"{where}: a JSON {type(came).__name__}; expected {SHAPES}.")
    if "messages" in came:
        return _messages(came["messages"], where)
    if isinstance(came.get("prompt"), str) and isinstance(came.get("completion"), str):
        return question_and_answer(came["prompt"], came["completion"])
    raise ValueError(f"{where}: keys {', '.join(map(repr, came)) or 'none'}; expected {SHAPES}.")


def _messages(messages: object, where: str) -> Row:
    if not isinstance(messages, list):
        raise ValueError(f'{where}: "messages" is a {type(messages).__name__}; expected {SHAPES}.')
    row: Row = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f'{where}: the message {json.dumps(message)[:80]} lacks a text as "role" or "content".')
        row.append({"role": role, "content": content})
    roles = [message["role"] for message in row]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        came = ", ".join(map(repr, roles)) or "none"
        raise ValueError(f'{where}: the roles are {came}; expected an "assistant" after at least one "user".')
    return row


def examples(rows: list[Row], tokenizer: Any, max_length: int) -> list[Example]:
    """One example for each answer in the rows, with all that was said before it as its prompt.

    Examples of more than `max_length` tokens are left out rather than cut off in the middle of an answer.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses a row.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template, which this example uses to write a conversation as text; "
            "take an instruction-tuned model (names that end in -Instruct, -it or -chat have one)."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{tokenizer.name_or_path} has no fast tokenizer, which is needed to tell the answer's tokens apart."
        )
    found = [
        _example(row[: turn + 1], tokenizer)
        for row in rows
        for turn, message in enumerate(row)
        if message["role"] == "assistant"
    ]
    return [example for example in found if len(example.input_ids) <= max_length]


def _example(turns: Row, tokenizer: Any) -> Example:
    try:
        prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses the row {json.dumps(turns)[:120]}: {error}") from error
    if not text.startswith(prompt):
        raise ValueError(
            "the model's chat template writes a prompt in another way once its answer follows; not supported here."
        )
    # the template's line break after the end-of-turn token is no part of the answer
    tokens = tokenizer(text.rstrip(), add_special_tokens=False, return_offsets_mapping=True)
    in_answer = [start >= len(prompt) for start, _ in tokens["offset_mapping"]]
    ids = tokens["input_ids"]
    return Example(ids, [token if learn else IGNORED for token, learn in zip(ids, in_answer, strict=True)])


def batches(data: list[Example], batch_size: int, steps: int, seed: int) -> list[list[Example]]:
    """The batches of a training run: the data in a new order each epoch, the same for the same seed."""
    shuffle = random.Random(seed)
    order: list[Example] = []
    while len(order) < steps * batch_size:
        order += shuffle.sample(data, len(data))
    return [order[start : start + batch_size] for start in range(0, steps * batch_size, batch_size)]


def collate(batch: list[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad a batch on the right. Returns input_ids, attention_mask and labels, each [batch, longest example], int64."""
    longest = max(len(example.input_ids) for example in batch)
    padding = [longest - len(example.input_ids) for example in batch]
    columns = {
        "input_ids": [example.input_ids + [pad_token_id] * pad for example, pad in zip(batch, padding, strict=True)],
        "attention_mask": [[1] * (longest - pad) + [0] * pad for pad in padding],
        "labels": [example.labels + [IGNORED] * pad for example, pad in zip(batch, padding, strict=True)],
    }
    return {name: torch.tensor(column) for name, column in columns.items()}
