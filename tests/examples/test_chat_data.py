"""Rows, the split, and which tokens the loss counts."""

import json
from pathlib import Path
from typing import Any

import chat_data
import pytest


def rows_of(*pairs: tuple[str, str]) -> list[list[dict[str, str]]]:
    return [chat_data.question_and_answer(*pair) for pair in pairs]


def test_the_loss_counts_the_answer_and_its_end_token_by_token(tokenizer: Any) -> None:
    answer = "  Green\n\nI think. \u00e9 \U0001f34f"
    (row,) = rows_of(("What colour is a plum?", answer))
    (example,) = chat_data.examples([row], tokenizer, max_length=1000)
    prompt = tokenizer.apply_chat_template(row[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt, (
        "the model answers after exactly the prompt that it was trained on"
    )
    assert example.labels[: len(prompt)] == [chat_data.IGNORED] * len(prompt)
    assert example.labels[len(prompt) :] == example.input_ids[len(prompt) :]
    assert tokenizer.decode(example.labels[len(prompt) :]) == answer + "<|im_end|>"
    assert example.labels[-1] == tokenizer.eos_token_id


def test_every_answer_of_a_conversation_is_learned_once_after_its_history(tokenizer: Any) -> None:
    row = rows_of(("one?", "first."))[0] + rows_of(("two?", "second."))[0]
    found = chat_data.examples([row], tokenizer, max_length=1000)
    learned = [tokenizer.decode([label for label in example.labels if label != chat_data.IGNORED]) for example in found]
    assert learned == ["first.<|im_end|>", "second.<|im_end|>"]
    assert "first.<|im_end|>" in tokenizer.decode(found[1].input_ids)


def test_a_template_that_rewrites_earlier_answers_is_served(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen3's does, which writes thoughts into the last answer alone."""
    template = (
        "{% for message in messages %}<{{ message['role'] }}>{% if loop.last and message['role'] == 'assistant' %}(thought)"
        "{% endif %}{{ message['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    row = rows_of(("one?", "first."))[0] + rows_of(("two?", "second."))[0]
    _, second = chat_data.examples([row], tokenizer, max_length=1000)
    assert tokenizer.decode(second.input_ids) == (
        "<user>one?<|im_end|><assistant>first.<|im_end|><user>two?<|im_end|><assistant>(thought)second.<|im_end|>"
    )


def test_padding_is_seen_neither_by_the_model_nor_by_the_loss(tokenizer: Any) -> None:
    data = chat_data.examples(rows_of(("a?", "Yes."), ("What colour is a fig?", "Green, I think.")), tokenizer, 1000)
    batch = chat_data.collate(data, pad_token_id=7)
    for example, ids, mask, labels in zip(
        data, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        length = len(example.input_ids)
        assert ids[:length].tolist() == example.input_ids
        assert labels[:length].tolist() == example.labels
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert set(ids[length:].tolist()) <= {7}
        assert set(labels[length:].tolist()) <= {chat_data.IGNORED}


def test_examples_that_are_too_long_are_left_out_whole(tokenizer: Any) -> None:
    rows = rows_of(("a?", "Yes."), ("a?", "Green. " * 50))
    short = chat_data.examples(rows, tokenizer, max_length=60)
    assert short == chat_data.examples(rows[:1], tokenizer, max_length=1000)


def test_every_row_is_used_before_any_is_used_again() -> None:
    data = [chat_data.Example([n], [n]) for n in range(10)]
    order = [example.input_ids[0] for batch in chat_data.batches(data, 4, 5, seed=0) for example in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    again = [example.input_ids[0] for batch in chat_data.batches(data, 4, 5, seed=0) for example in batch]
    assert order == again


def test_both_shapes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    system = {"role": "system", "content": "Be brief."}
    turns = [system, {"role": "user", "content": "q\u2028"}, {"role": "assistant", "content": "a"}]
    lines = [json.dumps({"messages": turns}, ensure_ascii=False), "", json.dumps({"prompt": "p", "completion": "c"})]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert chat_data.read_rows(path) == [turns, chat_data.question_and_answer("p", "c")]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "a", ', "not JSON"),
        ("[1, 2]", "a JSON list"),
        ('{"text": "hello"}', "keys 'text'"),
        ('{"prompt": "a", "completion": 3}', "keys 'prompt', 'completion'"),
        ('{"messages": "hello"}', '"messages" is a str'),
        ('{"messages": []}', "the roles are none"),
        ('{"messages": [{"role": "user"}]}', 'the message {"role": "user"} lacks'),
        ('{"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]}', "'human', 'gpt'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the roles are 'assistant'"),
    ],
)
def test_a_line_of_neither_shape_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected|lacks") as error:
        chat_data.read_rows(path)
    assert f"{path}, line 2" in str(error.value)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
