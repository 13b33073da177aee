"""Questions, endings and documents: what is written, what carries loss, and what becomes of rows that do not fit."""

from typing import Any

import pytest

from automodel_accel.data import (
    IGNORED,
    Batching,
    HellaSwagData,
    InstructionData,
    Sample,
    SquadData,
    TextData,
    open_data,
)
from automodel_accel.data.opening import corpus_of
from automodel_accel.data.tokenising import Encoder
from tests.data import tokenizers_made as by

SQUAD = {
    "id": "1",
    "title": "Rome",
    "context": "Rome is a city in Italy.",
    "question": "And of Italy?",
    "answers": {"text": ["Rome", "the city"], "answer_start": [0, 0]},
}
HELLASWAG = {
    "ctx": "A man is sitting on a roof. He",
    "endings": ["is a city.", "starts to pull up shingles.", "answers."],
    "label": "1",
}


def plain(family: str = "bytes") -> Any:
    return by.made(None, bos="<s>", eos="</s>", family=family, adds_bos=True)


def encoded(settings: Any, row: dict[str, Any], tokenizer: Any, seq_length: int = 4096) -> list[Sample]:
    return Encoder(settings, tokenizer, seq_length)([(0, row)])


def said_and_learned(tokenizer: Any, sample: Sample) -> tuple[str, str]:
    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    return text(sample.input_ids), text([label for label in sample.labels if label != IGNORED])


PLAIN: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "squad": (
        SquadData(),
        SQUAD,
        "<s>Context: Rome is a city in Italy.\nQuestion: And of Italy?\nAnswer: Rome</s>",
        " Rome</s>",
    ),
    "hellaswag": (
        HellaSwagData(),
        HELLASWAG,
        "<s>A man is sitting on a roof. He starts to pull up shingles.</s>",
        " starts to pull up shingles.</s>",
    ),
    "hellaswag, a number as label": (
        HellaSwagData(),
        {**HELLASWAG, "label": 2},
        "<s>A man is sitting on a roof. He answers.</s>",
        " answers.</s>",
    ),
    "instruction": (
        InstructionData(path="rows", columns={"question": "q", "answer": "a"}),
        {"q": "And of Italy?", "a": "Rome"},
        "<s>Question: And of Italy?\nAnswer: Rome</s>",
        " Rome</s>",
    ),
    "prompt that ends in a space": (
        InstructionData(path="rows", columns={"prompt": "prompt", "completion": "completion"}),
        {"prompt": "The capital of Italy is ", "completion": "Rome"},
        "<s>The capital of Italy is Rome</s>",
        " Rome</s>",
    ),
    "loss on all": (
        InstructionData(path="rows", answer_only=False),
        {"question": "And of Italy?", "answer": "Rome"},
        "<s>Question: And of Italy?\nAnswer: Rome</s>",
        "Question: And of Italy?\nAnswer: Rome</s>",
    ),
    "text": (TextData(path="rows"), {"text": "Rome is a city."}, "<s>Rome is a city.</s>", "Rome is a city.</s>"),
    "text with its ends in it": (
        TextData(path="rows"),
        {"text": "<s>Rome is a city.</s></s>"},
        "<s>Rome is a city.</s>",
        "Rome is a city.</s>",
    ),
}


@pytest.mark.parametrize("family", by.FAMILIES)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_texts(name: str, family: str) -> None:
    settings, row, said, learned = PLAIN[name]
    tokenizer = plain(family)
    [sample] = encoded(settings, row, tokenizer)
    assert said_and_learned(tokenizer, sample) == (said, learned)


@pytest.mark.parametrize("family", by.FAMILIES)
@pytest.mark.parametrize("name", ["squad", "hellaswag", "instruction", "prompt that ends in a space"])
def test_what_carries_no_loss_is_what_the_prompt_alone_is(name: str, family: str) -> None:
    settings, row, said, learned = PLAIN[name]
    tokenizer = plain(family)
    [sample] = encoded(settings, row, tokenizer)
    prompt = tokenizer(said.removeprefix("<s>").removesuffix(learned))["input_ids"]
    assert sample.input_ids[: len(prompt)] == prompt
    assert sample.labels == [IGNORED] * len(prompt) + sample.input_ids[len(prompt) :]


def test_chat_style_where_there_is_a_template() -> None:
    tokenizer = by.made(by.CHATML)
    [sample] = encoded(SquadData(), SQUAD, tokenizer)
    asked = "<|im_start|>user\nRome is a city in Italy.\n\nAnd of Italy?<|im_end|>\n<|im_start|>assistant\n"
    assert said_and_learned(tokenizer, sample) == (f"{asked}Rome<|im_end|>\n", "Rome<|im_end|>")
    [sample] = encoded(SquadData(style="plain"), SQUAD, by.made(by.CHATML, eos="</s>"))
    assert said_and_learned(tokenizer, sample)[1] == " Rome</s>"
    with pytest.raises(ValueError, match="has no chat template"):
        encoded(SquadData(style="chat"), SQUAD, plain())


@pytest.mark.parametrize(
    ("settings", "row", "reason"),
    [
        (SquadData(), {**SQUAD, "answers": {"text": [], "answer_start": []}}, "without an answer"),
        (SquadData(), {**SQUAD, "context": None}, "without column 'context'"),
        (HellaSwagData(), {**HELLASWAG, "label": ""}, "without a right ending"),
        (HellaSwagData(), {**HELLASWAG, "label": 3}, "without a right ending"),
        (InstructionData(path="rows"), {"question": "Why?"}, "without column 'answer'"),
        (InstructionData(path="rows"), {"question": "Why?", "answer": 7}, "no text in column 'answer'"),
        (TextData(path="rows"), {"text": " \n"}, "empty text in column 'text'"),
    ],
)
def test_rows_that_cannot_be_used_are_counted_or_stop(settings: Any, row: dict[str, Any], reason: str) -> None:
    encode = Encoder(settings, plain(), 64)
    assert encode([(7, row)]) == []
    assert encode.counts.left_out == {reason: 1}
    assert encode.counts.examples[reason][0].startswith("row 7: ")
    strict = type(settings)(**{**as_dict(settings), "strict": True})
    with pytest.raises(ValueError, match=f"row 7: {reason}.*strict"):
        Encoder(strict, plain(), 64)([(7, row)])


def as_dict(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


LONG = {"question": "What is the capital of France?", "answer": "The capital of France is Paris. And Rome of Italy."}


def test_policies_for_samples_that_are_too_long() -> None:
    tokenizer = plain()
    [whole] = encoded(InstructionData(path="rows"), LONG, tokenizer)
    length = len(whole.input_ids)
    most = length - 3
    cut = Encoder(InstructionData(path="rows", too_long="truncate"), tokenizer, most)
    assert cut([(0, LONG)]) == [Sample(whole.input_ids[:most], whole.labels[:most])]
    assert cut.counts.truncated == 1
    dropped = Encoder(InstructionData(path="rows"), tokenizer, most)
    assert dropped([(0, LONG)]) == []
    assert dropped.counts.left_out == {"longer than a row": 1}
    assert f"{length} tokens, where a row holds {most}" in str(dropped.counts)
    with pytest.raises(ValueError, match=f"a sample has {length} tokens, where a row holds {most}"):
        Encoder(InstructionData(path="rows", too_long="error"), tokenizer, most)([(0, LONG)])
    assert encoded(InstructionData(path="rows", too_long="error"), LONG, tokenizer, length) == [whole]


def test_a_truncated_sample_without_labels_is_counted_and_not_kept() -> None:
    encode = Encoder(InstructionData(path="rows", too_long="truncate"), plain(), 5)
    assert encode([(0, LONG)]) == []
    assert encode.counts.left_out == {"no token with loss after its end was cut off": 1}
    assert encode.counts.truncated == 0


def test_a_split_document_loses_nothing() -> None:
    tokenizer = plain()
    text = "Rome is a city in Italy. " * 9
    [whole] = encoded(TextData(path="rows"), {"text": text}, tokenizer)
    encode = Encoder(TextData(path="rows"), tokenizer, 16)
    parts = encode([(0, {"text": text})])
    assert [token for part in parts for token in part.input_ids] == whole.input_ids
    assert all(part.labels == [IGNORED, *part.input_ids[1:]] for part in parts)
    assert {len(part.input_ids) for part in parts[:-1]} == {16}
    assert encode.counts.split == 1


def test_nothing_left_says_what_became_of_the_rows() -> None:
    rows = [{"text": "Rome is a city in Italy."}, {"text": ""}, {"other": 1}]
    with pytest.raises(
        ValueError, match=r"(?s)gave no sample.*3 rows read, 0 samples.*has 'other'.*1 left out, longer than a row"
    ):
        open_data(TextData(path="rows", too_long="drop"), plain(), Batching(seq_length=4), rows=rows)


def test_counts_in_words_and_as_json_types() -> None:
    rows = [{"text": "Rome is a city in Italy."}, {"text": ""}]
    _, counts = corpus_of(TextData(path="rows"), plain(), Batching(seq_length=64), rows, progress=False)
    tokens = len(plain()("Rome is a city in Italy.")["input_ids"]) + 1
    assert counts.to_dict() == {
        **{"rows": 2, "samples": 1, "tokens": tokens, "label_tokens": tokens - 1, "truncated": 0, "split": 0},
        "left_out": {"empty text in column 'text'": 1},
    }
    assert str(counts).splitlines()[1:] == ["1 left out, empty text in column 'text'", "  row 1: ''"]


def test_tokenizers_that_do_not_serve() -> None:
    with pytest.raises(ValueError, match="str is no fast tokenizer"):
        Encoder(TextData(path="rows"), "not a tokenizer", 8)
    endless = plain()
    endless.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token"):
        Encoder(TextData(path="rows"), endless, 8)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"question": "q"}, "are given for question; expected question and answer or"),
        ({"qestion": "q", "answer": "a"}, "Did you mean 'question'"),
        ({"prompt": "p", "answer": "a"}, "are given for prompt, answer; expected"),
    ],
)
def test_columns_that_make_no_pair(columns: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        InstructionData(path="rows", columns=columns)
