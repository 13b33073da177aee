"""The collate that the processor drives: the labels of every family, token by token, and what it refuses."""

from typing import Any

import pytest
import torch
import transformers
from packaging import version

from automodel_accel.data.vision_answers import Rendered, find_answers, render
from automodel_accel.data.vision_chats import BadSample
from automodel_accel.data.vision_collate import IGNORED, VisionCollate
from tests.data.vision_processors import CHATML, FAMILIES, blip_2, chatml, llava, paligemma, picture

RED, GREEN, BLUE = (
    picture(color, size) for color, size in (("red", (32, 32)), ("green", (64, 32)), ("blue", (32, 48)))
)
GENERIC = sorted(set(FAMILIES) - {"paligemma"})
END = "<|im_end|>"
# its processor expands images without telling transformers, whose mask is then off by what was added
WITHOUT_ORACLE = {"idefics2"}
IS_OLD = version.parse(transformers.__version__) < version.parse(
    "5.23"
)  # its mask of several turns is off for every family
NOT_MIXED = {"mllama"} if IS_OLD else set()  # it refused text alone beside images


def build(family: str) -> Any:
    try:
        return FAMILIES[family]()
    except (ImportError, AttributeError) as error:  # an older transformers asks for torchvision, or lacks the family
        pytest.skip(" ".join(str(error).split())[:80])


def chat(*turns: Any) -> list[dict[str, Any]]:
    """Questions, each a list of images and texts, and answers in turn."""
    found = []
    for number, turn in enumerate(turns):
        parts = turn if isinstance(turn, list) else [turn]
        content = [
            {"type": "text", "text": one} if isinstance(one, str) else {"type": "image", "image": one} for one in parts
        ]
        found.append({"role": "assistant" if number % 2 else "user", "content": content})
    return found


ONE = [chat([RED, "Which color?"], "red"), chat([GREEN, "And which is it here?"], "a very green one")]
SEVERAL = [chat([RED, GREEN, "Compare."], "the first is red"), chat([BLUE, "Color?"], "blue")]
# the answer is said by the user before, and images come late
TURNS = [
    chat([RED, "Is this red?"], "red", ["red\n", GREEN, "And this: red?"], "red"),
    chat([BLUE, "Color?"], "blue", "blue, sure?", "blue"),
]
MIXED = [chat([RED, "Which color?"], "red"), chat("One plus one?", "two")]
TEXT = [chat("One plus one?", "two"), chat("Bye.", "farewell")]
CASES = {"one": ONE, "several": SEVERAL, "turns": TURNS, "mixed": MIXED, "text": TEXT}


def learned(processor: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    """The text that each row learns."""
    return [
        processor.tokenizer.decode(ids[labels != IGNORED]) for ids, labels in zip(batch["input_ids"], batch["labels"])
    ]


def media_tokens(processor: Any) -> list[int]:
    """Special tokens that are no part of a chat without images."""
    added = processor.tokenizer.get_added_vocab()
    return [token for word, token in added.items() if word not in ("<pad>", "<bos>", "<eos>", "<|im_start|>", END)]


def pixels(batch: Any) -> Any:
    return next((batch[name] for name in sorted(batch) if name.startswith("pixel_values")), None)


def answers(one: list[dict[str, Any]]) -> str:
    return "".join(turn["content"][0]["text"] + END for turn in one if turn["role"] == "assistant")


def with_generation(processor: Any) -> str:
    """The processor's template, marking for transformers what the assistant generates."""
    marked = processor.chat_template.replace(
        "{% for c in m.content %}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content[0].text }}<|im_end|>"
        "{% endgeneration %}{% else %}{% for c in m.content %}",
    )
    assert marked != processor.chat_template
    return str(marked.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"))


@pytest.mark.parametrize("family", GENERIC)
def test_loss_is_on_the_answers_of_each_family(family: str) -> None:
    processor = build(family)
    for case, chats in CASES.items():
        if case == "mixed" and family in NOT_MIXED:
            continue
        check_labels(processor, chats, has_images=case != "text")


def check_labels(processor: Any, chats: list[Any], has_images: bool) -> None:
    batch = VisionCollate(processor)(chats)
    assert learned(processor, batch) == [answers(one) for one in chats]
    is_label = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][is_label], batch["input_ids"][is_label])
    assert not is_label[batch["attention_mask"] == 0].any()
    is_media = torch.isin(batch["input_ids"], torch.tensor(media_tokens(processor)))
    assert is_media.any() == has_images
    assert not (is_label & is_media).any()
    assert (pixels(batch) is not None) == has_images


@pytest.mark.skipif(IS_OLD, reason="transformers before 5.23 masks other tokens once an image comes before an answer")
@pytest.mark.parametrize("family", sorted(set(GENERIC) - WITHOUT_ORACLE))
def test_tokens_and_labels_are_what_transformers_makes_of_a_marked_template(family: str) -> None:
    """An oracle of its own: the template says what is generated, and transformers follows it through the images."""
    processor = build(family)
    ours = VisionCollate(processor)(TURNS)
    theirs = processor.apply_chat_template(
        TURNS,
        chat_template=with_generation(processor),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right", "return_mm_token_type_ids": False},
    )
    assert torch.equal(ours["input_ids"], torch.as_tensor(theirs["input_ids"]))
    assert torch.equal(ours["labels"] != IGNORED, torch.as_tensor(theirs["assistant_masks"]).bool())
    assert torch.equal(pixels(ours), pixels(theirs))


def test_tokens_of_images_in_front_of_the_text_move_the_answers() -> None:
    processor = blip_2()
    batch = VisionCollate(processor)(ONE)
    assert learned(processor, batch) == [answers(one) for one in ONE]
    assert (batch["input_ids"][:, :4] == processor.tokenizer.convert_tokens_to_ids("<image>")).all()


def test_paligemma_sees_its_prefix_and_learns_its_suffix() -> None:
    processor = paligemma()
    batch = VisionCollate(processor)(ONE)
    assert learned(processor, batch) == ["red<eos>", "a very green one<eos>"]
    assert torch.equal(batch["token_type_ids"].bool(), batch["labels"] != IGNORED)
    assert (batch["input_ids"] == processor.image_token_id).sum().item() == 32


@pytest.mark.parametrize(("case", "why"), [("turns", "4 turns"), ("text", "no image")])
def test_paligemma_refuses_what_it_is_not_made_for(case: str, why: str) -> None:
    with pytest.raises(BadSample, match=why):
        VisionCollate(paligemma())(CASES[case])


def test_the_processor_is_left_as_it_is() -> None:
    processor = llava()
    kind, before = type(processor.tokenizer), dict(vars(processor))
    VisionCollate(processor)(ONE)
    assert type(processor.tokenizer) is kind
    assert vars(processor) == before


def test_a_template_that_ends_no_turn_gets_the_end_of_sequence() -> None:
    plain = "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{{ c.text or '<image>' }} {% endfor %}{% endfor %}"
    processor = llava(plain + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert learned(processor, VisionCollate(processor)(ONE)) == ["red<eos>", "a very green one<eos>"]
    assert learned(processor, VisionCollate(processor)([TURNS[1]])) == ["blueblue<eos>"]


def test_a_prompt_that_goes_on_to_think_is_no_part_of_an_answer() -> None:
    template = chatml("<image>").replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}"
    )
    processor = llava(template)
    assert learned(processor, VisionCollate(processor)(TURNS)) == [answers(one) for one in TURNS]


def test_a_template_of_ones_own_stands_in() -> None:
    processor = llava()
    processor.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; pass chat_template="):
        VisionCollate(processor)(ONE)
    batch = VisionCollate(processor, chat_template=chatml("<image>"))(ONE)
    assert learned(processor, batch) == [answers(one) for one in ONE]


def test_a_template_that_begins_the_text_is_not_begun_again() -> None:
    processor = llava("<bos>" + chatml("<image>"))
    batch = VisionCollate(processor)(ONE)
    assert (batch["input_ids"] == processor.tokenizer.bos_token_id).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no images here') }}", "the chat template refuses it: no images here"),
        (CHATML.replace("{{ c.text }}", "{{ c.text | upper }}").replace("add_generation_prompt", "false"), None),
        (
            "{% for m in messages %}{{ loop.length }}{{ m.role }}<|im_end|>{% endfor %}",
            "in another way|changes an answer",
        ),
    ],
)
def test_templates_that_are_not_followed(template: str, why: str | None) -> None:
    processor = llava(template.replace("IMAGE", "<image>"))
    if why is None:  # no prompt of its own, and the text is not what was said: the turn is learned as it is written
        assert "RED" in learned(processor, VisionCollate(processor)(ONE))[0]
        return
    with pytest.raises(BadSample, match=why):
        VisionCollate(processor)(TURNS)


def test_a_long_sample_is_dropped_or_stops_and_is_never_cut() -> None:
    processor = llava()
    lengths = VisionCollate(processor)(ONE)["attention_mask"].sum(1).tolist()
    assert lengths[0] < lengths[1]
    tight = VisionCollate(processor, max_length=lengths[0])
    tight.check(ONE[0])
    assert torch.equal(tight(ONE[:1])["input_ids"], VisionCollate(processor)(ONE[:1])["input_ids"])
    with pytest.raises(BadSample, match=f"has {lengths[1]} tokens, max_length is {lengths[0]}"):
        tight.check(ONE[1])
    with pytest.raises(BadSample, match="max_length"):
        tight(ONE)
    with pytest.raises(ValueError, match="raise max_length") as stopped:
        VisionCollate(processor, max_length=lengths[0], too_long="error").check(ONE[1])
    assert not isinstance(stopped.value, BadSample)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        tokenizer = None

    with pytest.raises(ValueError, match="Slow has no fast tokenizer"):
        VisionCollate(Slow())


def test_a_processor_that_alters_its_tokens_is_refused() -> None:
    processor = llava()
    original = type(processor)

    class Altering(original):  # type: ignore[misc, valid-type]
        def __call__(self, **kwargs: Any) -> Any:
            batch = original.__call__(self, **kwargs)
            batch["input_ids"] = batch["input_ids"].flip(1)
            return batch

    processor.__class__ = Altering
    with pytest.raises(ValueError, match="Altering changes the tokens"):
        VisionCollate(processor)(ONE)


def test_an_answer_whose_surroundings_change_is_refused() -> None:
    rendered = render(llava(), ONE[0])
    with pytest.raises(BadSample, match="changes the text around an answer"):
        find_answers(rendered, rendered.text.replace("red", "blue"))


def test_an_answer_is_told_from_the_same_words_before_it() -> None:
    """The user writes what looks like an answer; only the place behind it is right."""
    text = "q: a: yes q: <image> a: yes q: <image> more a: yes."
    spans = ((24, 27), (47, 50))
    assert [text[start:stop] for start, stop in spans] == ["yes", "yes"]
    expanded = text.replace("<image>", "<row><image><image></row>")
    found = find_answers(Rendered(text, spans), expanded)
    assert [expanded[:start].count("<row>") for start, _ in found] == [1, 2]
    assert [expanded[start:stop] for start, stop in found] == ["yes", "yes"]
