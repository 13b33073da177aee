"""Chats of two turns: questions and answers on four English topics of the package chatterbot-corpus (BSD-3 licence)."""

import json
import random
from pathlib import Path

import yaml

from automodel_accel.demo.cache import made_once, package_folder, version_of, write_lines

Row = list[dict[str, str]]  # the messages of a conversation

ADVICE = "demo:chatterbot comes in the package chatterbot-corpus; `pip install` it, or name other data."
TOPICS = ("tech_support", "trivia", "science", "computers")
HELD_OUT_SHARE, HELD_OUT_LIMIT, SEED = 0.1, 40, 0  # of the distinct rows


def folder() -> Path:
    """train.jsonl and validation.jsonl, of {"messages": [...], "question": ..., "answer": ...}; no answer is in both.

    Raises:
        ValueError: the package is not installed.
    """
    rows = chatterbot_rows()
    parts = zip(("train", "validation"), split_by_answer(rows, HELD_OUT_SHARE, HELD_OUT_LIMIT, SEED), strict=True)

    def write(made: Path) -> None:
        for name, part in parts:
            said = ({"messages": row, "question": row[0]["content"], "answer": row[1]["content"]} for row in part)
            write_lines(made / f"{name}.jsonl", said)

    return made_once(f"chatterbot-corpus-{version_of('chatterbot-corpus')}", write)


def chatterbot_rows() -> list[Row]:
    """The conversations, as they stand in the package.

    Raises:
        ValueError: the package is not installed.
    """
    english = package_folder("chatterbot_corpus", ADVICE) / "data" / "english"
    rows = []
    for topic in TOPICS:
        corpus = yaml.safe_load((english / f"{topic}.yml").read_text(encoding="utf-8"))
        rows += [question_and_answer(str(turns[0]), str(turns[1])) for turns in corpus["conversations"]]
    return rows


def question_and_answer(question: str, answer: str) -> Row:
    """A row of two turns."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def split_by_answer(rows: list[Row], share: float, limit: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a share of the distinct rows, at most `limit`. No answer text stands in both parts.

    Rows that share an answer with a held-out row are dropped from the training part: with them, the held-out loss would
    measure memory instead of learning.

    Returns:
        The training rows, in their order and with their repetitions, and the held-out rows, each once.
    """
    distinct = list({json.dumps(row): row for row in rows}.values())
    random.Random(seed).shuffle(distinct)
    held_out = distinct[: min(limit, max(1, int(len(distinct) * share)))]
    unseen = {answer for row in held_out for answer in _answers(row)}
    return [row for row in rows if unseen.isdisjoint(_answers(row))], held_out


def _answers(row: Row) -> list[str]:
    return [message["content"] for message in row if message["role"] == "assistant"]
