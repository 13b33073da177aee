"""What carries loss, token by token, in conversations as templates in the style of real models write them."""

from typing import Any

import pytest

from automodel_accel.data import IGNORED, ChatData, Sample
from automodel_accel.data.tokenising import Encoder
from tests.data import tokenizers_made as by

ASKED = {"role": "user", "content": "What is the capital of France?"}
PARIS = {"role": "assistant", "content": "The capital of France is Paris."}
AGAIN = {"role": "user", "content": "And of Italy?"}
ROME = {"role": "assistant", "content": "Rome."}
SYSTEM = {"role": "system", "content": "Answer briefly."}
TWO_TURNS = [ASKED, PARIS, AGAIN, ROME]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "sunny"}
SUNNY = {"role": "assistant", "content": "It is sunny."}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather"}}]
THOUGHT = {**ROME, "reasoning_content": "The user asks about a city."}

Pieces = list[tuple[str, bool]]  # a text in parts, and whether each carries loss


def encoded(tokenizer: Any, row: dict[str, Any], **settings: Any) -> list[Sample]:
    return Encoder(ChatData(path="rows", strict=True, **settings), tokenizer, 4096)([(0, row)])


def expected(tokenizer: Any, pieces: Pieces) -> Sample:
    """Each part tokenised by itself: nothing here knows of characters' offsets."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in pieces:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    return Sample(ids, labels)


def chatml() -> Any:
    return by.made(by.CHATML)


def llama() -> Any:
    return by.made(by.LLAMA, bos="<|begin_of_text|>", eos="<|eot_id|>", adds_bos=True)


def mistral() -> Any:
    return by.made(by.MISTRAL, bos="<s>", eos="</s>", family="words", adds_bos=True)


def gemma() -> Any:
    return by.made(by.GEMMA, bos="<bos>", eos="<eos>", family="words", adds_bos=True)


def qwen3() -> Any:
    return by.made(by.QWEN3)


CHATML_TURNS: Pieces = [
    ("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", False),
    ("The capital of France is Paris.<|im_end|>", True),
    ("\n<|im_start|>user\nAnd of Italy?<|im_end|>\n<|im_start|>assistant\n", False),
    ("Rome.<|im_end|>", True),
    ("\n", False),
]
CASES: dict[str, tuple[Any, dict[str, Any], Pieces]] = {
    "chatml": (chatml, {"messages": TWO_TURNS}, CHATML_TURNS),
    "chatml with markers": (lambda: by.made(by.CHATML_MARKED), {"messages": TWO_TURNS}, CHATML_TURNS),
    "llama": (
        llama,
        {"messages": [SYSTEM, ASKED, PARIS, AGAIN, ROME]},
        [
            ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nAnswer briefly.<|eot_id|>", False),
            ("<|start_header_id|>user<|end_header_id|>\n\nWhat is the capital of France?<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("The capital of France is Paris.<|eot_id|>", True),
            ("<|start_header_id|>user<|end_header_id|>\n\nAnd of Italy?<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("Rome.<|eot_id|>", True),
        ],
    ),
    "llama with a tool": (
        llama,
        {"messages": [ASKED, CALLS, RESULT, SUNNY]},
        [
            (
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is the capital of France?<|eot_id|>",
                False,
            ),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ('{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>', True),
            ("<|start_header_id|>ipython<|end_header_id|>\n\nsunny<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("It is sunny.<|eot_id|>", True),
        ],
    ),
    "mistral": (
        mistral,
        {"messages": TWO_TURNS},
        [
            ("<s>[INST] What is the capital of France?[/INST]", False),
            (" The capital of France is Paris.</s>", True),
            ("[INST] And of Italy?[/INST]", False),
            (" Rome.</s>", True),
        ],
    ),
    "mistral with a tool": (
        mistral,
        {"messages": [ASKED, CALLS, RESULT, SUNNY], "tools": TOOLS},
        [
            (
                '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather", "description": "The weather"}}]',
                False,
            ),
            ("[/AVAILABLE_TOOLS][INST] What is the capital of France?[/INST]", False),
            ('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>', True),
            ("[TOOL_RESULTS] sunny[/TOOL_RESULTS]", False),
            (" It is sunny.</s>", True),
        ],
    ),
    "gemma": (
        gemma,
        {"messages": TWO_TURNS},
        [
            ("<bos><start_of_turn>user\nWhat is the capital of France?<end_of_turn>\n<start_of_turn>model\n", False),
            ("The capital of France is Paris.<end_of_turn>", True),
            ("\n<start_of_turn>user\nAnd of Italy?<end_of_turn>\n<start_of_turn>model\n", False),
            ("Rome.<end_of_turn>", True),
            ("\n", False),
        ],
    ),
    "qwen3 with tools": (
        qwen3,
        {"messages": [ASKED, {**CALLS, "reasoning_content": "I think"}, RESULT, SUNNY], "tools": TOOLS},
        [
            ("<|im_start|>system\n# Tools\n", False),
            ('{"type": "function", "function": {"name": "weather", "description": "The weather"}}<|im_end|>\n', False),
            ("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", False),
            (
                '<think>\nI think\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
                True,
            ),
            ("<|im_end|>", True),
            ("\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n", False),
            ("<think>\n\n</think>\n\nIt is sunny.<|im_end|>", True),
            ("\n", False),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_lies_on_what_the_assistant_wrote_alone(name: str) -> None:
    make, row, pieces = CASES[name]
    tokenizer = make()
    [sample] = encoded(tokenizer, row)
    assert sample == expected(tokenizer, pieces)
    written = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"))["input_ids"]
    assert sample.input_ids == written, "not what the model sees when it answers"


@pytest.mark.parametrize("family", by.FAMILIES)
def test_spaces_carry_loss_in_answers_alone(family: str) -> None:
    """As the indents of code, of which some tokenizers say that their tokens stand for no character."""
    code = "Rome:\n        a city\n\n    of Italy   "
    tokenizer = by.made(
        by.LLAMA.replace(" | trim", ""), bos="<|begin_of_text|>", eos="<|eot_id|>", family=family, adds_bos=True
    )
    [sample] = encoded(tokenizer, {"messages": [{**ASKED, "content": code}, {**ROME, "content": code}]})
    head = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    pieces = [
        (f"{head}{code}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", False),
        (f"{code}<|eot_id|>", True),
    ]
    assert sample == expected(tokenizer, pieces)


def test_markers_give_the_mask_that_transformers_gives() -> None:
    tokenizer = by.made(by.CHATML_MARKED)
    [sample] = encoded(tokenizer, {"messages": [SYSTEM, *TWO_TURNS]})
    theirs = tokenizer.apply_chat_template(
        [SYSTEM, *TWO_TURNS], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    assert sample.input_ids == theirs["input_ids"]
    assert [int(label != IGNORED) for label in sample.labels] == theirs["assistant_masks"]


@pytest.mark.parametrize("template", [by.CHATML, by.CHATML_MARKED], ids=["prefixes", "markers"])
def test_masked_history_leaves_the_last_answer(template: str) -> None:
    tokenizer = by.made(template)
    [sample] = encoded(tokenizer, {"messages": TWO_TURNS}, history="mask")
    last_only = [(text, learned and text.startswith("Rome")) for text, learned in CHATML_TURNS]
    assert sample == expected(tokenizer, last_only)


@pytest.mark.parametrize("template", [by.CHATML, by.CHATML_MARKED], ids=["prefixes", "markers"])
def test_split_history_is_one_sample_an_answer(template: str) -> None:
    tokenizer = by.made(template)
    first, second = encoded(tokenizer, {"messages": TWO_TURNS}, history="split")
    assert first == expected(tokenizer, [*CHATML_TURNS[:2], ("\n", False)])
    assert second == encoded(tokenizer, {"messages": TWO_TURNS}, history="mask")[0]


def test_reasoning_dropped_from_history_is_refused_with_a_way_out() -> None:
    row = {"messages": [ASKED, {**PARIS, "reasoning_content": "I think"}, AGAIN, THOUGHT]}
    with pytest.raises(
        ValueError, match=r"in another way once the rest.*<think>.*history: \"split\".*\"mask\".*generation"
    ):
        encoded(qwen3(), row)
    first, last = encoded(qwen3(), row, history="split")
    assert first == expected(
        qwen3(),
        [
            ("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", False),
            ("<think>\nI think\n</think>\n\nThe capital of France is Paris.<|im_end|>", True),
            ("\n", False),
        ],
    )
    as_seen: Pieces = [
        ("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", False),
        ("The capital of France is Paris.<|im_end|>\n<|im_start|>user\nAnd of Italy?<|im_end|>\n", False),
        ("<|im_start|>assistant\n", False),
        ("<think>\nThe user asks about a city.\n</think>\n\nRome.<|im_end|>", True),
        ("\n", False),
    ]
    assert last == expected(qwen3(), as_seen)
    assert encoded(qwen3(), row, history="mask") == [last]


def test_tools_that_move_are_refused() -> None:
    row = {"messages": [ASKED, PARIS, AGAIN, ROME], "tools": TOOLS}
    with pytest.raises(ValueError, match="message 1, in another way"):
        encoded(mistral(), row)


def test_a_prompt_that_changes_with_its_answer_is_refused() -> None:
    """As the generation prompts of some reasoning models, which open a thought that the conversation does not have."""
    opens_a_thought = by.CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
    with pytest.raises(ValueError, match=r"message 1, in another way.*Give a chat_template with"):
        encoded(by.made(opens_a_thought), {"messages": [ASKED, PARIS]})


def test_masked_reasoning() -> None:
    tokenizer = qwen3()
    [sample] = encoded(tokenizer, {"messages": [ASKED, THOUGHT]}, mask_reasoning=True)
    assert sample == expected(
        tokenizer,
        [
            ("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", False),
            ("<think>\nThe user asks about a city.\n</think>\n\n", False),
            ("Rome.<|im_end|>", True),
            ("\n", False),
        ],
    )


def test_masked_reasoning_inside_of_the_content() -> None:
    tokenizer = chatml()
    thinks = {"role": "assistant", "content": "<think>the user</think> Rome. <think>a city</think>Paris."}
    [sample] = encoded(tokenizer, {"messages": [ASKED, thinks]}, mask_reasoning=True)
    assert learned(tokenizer, sample) == " Rome. Paris.<|im_end|>"


def test_reasoning_between_other_markers_is_not_learned_unnoticed() -> None:
    own = by.QWEN3.replace("<think>", "(thought)").replace("</think>", "(end)")
    row = {"messages": [ASKED, THOUGHT]}
    with pytest.raises(ValueError, match=r"mask_reasoning.*expected reasoning_markers"):
        encoded(by.made(own), row, mask_reasoning=True)
    [sample] = encoded(by.made(own), row, mask_reasoning=True, reasoning_markers=("(thought)", "(end)"))
    assert learned(by.made(own), sample) == "Rome.<|im_end|>"


def learned(tokenizer: Any, sample: Sample) -> str:
    return str(
        tokenizer.decode([label for label in sample.labels if label != IGNORED], clean_up_tokenization_spaces=False)
    )


def test_loss_on_every_token() -> None:
    [sample] = encoded(chatml(), {"messages": TWO_TURNS}, assistant_only=False)
    assert sample.labels == [IGNORED, *sample.input_ids[1:]]


def test_begin_and_end_stand_once() -> None:
    for make, begin in ((llama, "<|begin_of_text|>"), (mistral, "<s>"), (gemma, "<bos>")):
        tokenizer = make()
        [sample] = encoded(tokenizer, {"messages": [ASKED, PARIS]})
        assert sample.input_ids.count(tokenizer.convert_tokens_to_ids(begin)) == 1


def test_what_follows_the_last_answer_is_left_out() -> None:
    tokenizer = chatml()
    assert encoded(tokenizer, {"messages": [ASKED, PARIS, AGAIN]}) == encoded(tokenizer, {"messages": [ASKED, PARIS]})


def test_arguments_as_text_and_keys_without_a_value() -> None:
    """As the OpenAI API has them, and as tables give back what other rows have."""
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    as_text = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    filled_up = {**RESULT, "tool_calls": None}
    row = {"messages": [ASKED, as_text, filled_up, SUNNY], "tools": None}
    assert encoded(llama(), row) == encoded(llama(), {"messages": [ASKED, CALLS, RESULT, SUNNY]})


def test_template_given_as_text_and_as_file(tmp_path: Any) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(by.CHATML, encoding="utf-8")
    wanted = encoded(chatml(), {"messages": TWO_TURNS})
    assert encoded(by.made(by.GEMMA, bos="<bos>"), {"messages": TWO_TURNS}, chat_template=by.CHATML) == wanted
    assert encoded(by.made(None), {"messages": TWO_TURNS}, chat_template=str(file)) == wanted


def test_template_variables_reach_the_template() -> None:
    tokenizer = by.made("{{ name }}" + by.CHATML)
    [sample] = encoded(tokenizer, {"messages": [ASKED, PARIS]}, template_variables={"name": "user"})
    assert (
        sample.input_ids
        == tokenizer(f"user{tokenizer.apply_chat_template([ASKED, PARIS], tokenize=False)}")["input_ids"]
    )


@pytest.mark.parametrize(
    ("tokenizer", "settings", "said"),
    [
        (by.made(None), {}, "has no chat template"),
        (by.made(None), {"chat_template": "no_such.jinja"}, "no such file, and no Jinja template"),
        (by.made(by.CHATML_MARKED_EMPTY), {}, "marked nothing"),
    ],
)
def test_templates_that_do_not_serve(tokenizer: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encoded(tokenizer, {"messages": TWO_TURNS}, **settings)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([SYSTEM, ASKED, PARIS], "refused by the chat template: System role not supported"),
        ([ASKED], "without an answer: the roles are user"),
        ([], "no list of messages"),
        ("not json", "text that is not JSON"),
        ([{"content": "x"}], "a message without a role"),
        ([ASKED, {"role": "assistant"}], "a message without content"),
        ([ASKED, {"role": "assistant", "tool_calls": [{"name": "f"}]}], "without a function's name"),
    ],
)
def test_conversations_that_cannot_be_used(messages: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encoded(gemma(), {"messages": messages})
