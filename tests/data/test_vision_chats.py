"""Rows in the schema of each data set become chats; rows that cannot be used say why."""

import json
from typing import Any

import pytest

from automodel_accel.data.vision_chats import BadSample, as_tokens, chat_of
from automodel_accel.data.vision_settings import CordV2, ImageChat, Llava, MedPix, Rdr

LLAVA, CHAT = Llava(path="rows.json"), ImageChat(path="rows.jsonl")


def image(source: Any) -> dict[str, Any]:
    return {"type": "image", "image": source}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def asked(*parts: dict[str, Any], answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": [text(answer)]}]


def test_cord_v2_is_learned_as_donut_writes_it() -> None:
    parse = {
        "menu": [{"nm": "TEA", "price": "2.00"}, {"nm": "CAKE", "price": "3.50"}],
        "total": {"total_price": "5.50"},
    }
    expected = (
        "<s_total><s_total_price>5.50</s_total_price></s_total>"
        "<s_menu><s_price>2.00</s_price><s_nm>TEA</s_nm><sep/><s_price>3.50</s_price><s_nm>CAKE</s_nm></s_menu>"
    )
    for truth in ({"gt_parse": parse, "valid_line": []}, {"gt_parses": [parse, {"other": "one"}]}):
        row = {"image": "a.png", "ground_truth": json.dumps(truth)}
        assert chat_of(CordV2(), row) == asked(image("a.png"), text("Describe this image."), answer=expected)


def test_a_text_sequence_is_its_text() -> None:
    assert as_tokens({"text_sequence": "as it is"}) == "as it is"


def test_rdr_and_medpix() -> None:
    row = {"image": "a.png", "text": "A chair."}
    assert chat_of(Rdr(prompt="What?"), row) == asked(image("a.png"), text("What?"), answer="A chair.")
    row = {"image_id": "b.png", "question": "Which organ?", "answer": "The lung."}
    assert chat_of(MedPix(), row) == asked(image("b.png"), text("Which organ?"), answer="The lung.")


def test_llava_puts_images_where_they_are_marked() -> None:
    turns = [
        ("human", "<image>\nFirst <image> second?"),
        ("gpt", "Both."),
        ("human", "Sure?"),
        ("gpt", "<image> is a word here."),
    ]
    row = {
        "id": "1",
        "image": ["a.png", "b.png"],
        "conversations": [{"from": role, "value": value} for role, value in turns],
    }
    assert chat_of(LLAVA, row) == [
        *asked(image("a.png"), text("First "), image("b.png"), text(" second?"), answer="Both."),
        *asked(text("Sure?"), answer="<image> is a word here."),
    ]


def test_llava_takes_text_alone_and_images_without_a_marker() -> None:
    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two."}]
    assert chat_of(LLAVA, {"conversations": turns}) == asked(text("How many?"), answer="Two.")
    assert chat_of(LLAVA, {"image": "a.png", "conversations": turns}) == asked(
        image("a.png"), text("How many?"), answer="Two."
    )


@pytest.mark.parametrize(
    "part", [{"type": "image"}, {"type": "image", "image": "a.png"}, {"type": "image", "path": "a.png"}]
)
def test_image_chat_has_images_in_its_parts_or_beside_them(part: dict[str, Any]) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [part, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    beside = {} if len(part) > 1 else {"images": ["a.png"]}
    system = {"role": "system", "content": [text("Be brief.")]}
    assert chat_of(CHAT, {"messages": messages, **beside}) == [
        system,
        *asked(image("a.png"), text("What?"), answer="A cat."),
    ]


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


GPT = {"from": "gpt", "value": "Yes."}


@pytest.mark.parametrize(
    ("settings", "row", "why"),
    [
        (CordV2(), {"image": "a.png"}, "no 'ground_truth'; its columns are 'image'"),
        (CordV2(), {"image": "a.png", "ground_truth": "{"}, "not JSON"),
        (CordV2(), {"image": "a.png", "ground_truth": "{}"}, "no gt_parse"),
        (CordV2(), {"image": "a.png", "ground_truth": "[]"}, "no gt_parse"),
        (Rdr(), {"text": "A chair."}, "no 'image'"),
        (Rdr(), {"image": "a.png", "text": 3}, "'text' is a int, expected a str"),
        (MedPix(), {"image_id": "a.png", "question": "?", "answer": None}, "no 'answer'"),
        (LLAVA, {"image": "a.png"}, "no 'conversations'"),
        (LLAVA, {"conversations": []}, "the roles are none"),
        (LLAVA, {"conversations": [GPT]}, "expected a user first"),
        (LLAVA, {"conversations": [human("?")]}, "the assistant last"),
        (LLAVA, {"conversations": [{"from": "robot", "value": "?"}, GPT]}, "a turn of 'robot'"),
        (LLAVA, {"conversations": ["?", GPT]}, "a turn of None"),
        (LLAVA, {"conversations": [human(3), GPT]}, "the content of a turn is a int"),
        (LLAVA, {"image": ["a.png"], "conversations": [human("<image> <image>"), GPT]}, "no image left"),
        (LLAVA, {"image": ["a.png", "b.png"], "conversations": [human("<image>"), GPT]}, "2 images, and places for 1"),
        (LLAVA, {"video": "a.mp4", "conversations": [human("?"), GPT]}, "it has a video"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": [image("a.png")]}]},
            "the assistant shows an image",
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_why(settings: Any, row: dict[str, Any], why: str) -> None:
    with pytest.raises(BadSample, match=why):
        chat_of(settings, row)
