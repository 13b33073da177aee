"""A chat as the text of a template, and where in it the assistant speaks."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from automodel_accel.data.vision_chats import BadSample, Chat


@dataclass(frozen=True, slots=True)
class Rendered:
    """One chat as text, images still one placeholder each.

    Attributes:
        text: The text.
        answers: (first character, one past the last) of each answer, the token that ends the turn included.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def render(processor: Any, chat: Chat, template: str | None = None) -> Rendered:
    """Write a chat by the processor's template, or by `template`.

    An answer begins where the text for generation ends. Where the template closes the last answer with no token of its own, the
    end-of-sequence token is appended: nothing else would teach the model to stop.

    Raises:
        ValueError: there is no template.
        BadSample: the template refuses the chat, or writes it so that the answers are not found.
    """
    if template is None and not getattr(processor, "chat_template", None):
        raise ValueError(
            f"this {type(processor).__name__} has no chat template; pass chat_template=, a Jinja text, or take an "
            "instruction-tuned model."
        )
    shown = [_without_pixels(message) for message in chat]
    try:
        text = _write(processor, shown, template)
        answers = [
            _answer(processor, shown, turn, template, text)
            for turn, message in enumerate(shown)
            if message["role"] == "assistant"
        ]
    except TemplateError as error:
        raise BadSample(f"the chat template refuses it: {error}") from error
    start, stop = answers[-1]
    if not _is_closed(processor.tokenizer, text[start:stop], shown[-1]):
        text = text[:stop] + processor.tokenizer.eos_token
        answers[-1] = (start, len(text))
    return Rendered(text, tuple(answers))


def find_answers(rendered: Rendered, expanded: str) -> list[tuple[int, int]]:
    """Where the answers are once every image is as many placeholders as the model makes of it.

    Each is looked for behind the one before, with all of the text in front of it that stayed as it was. Where the same words occur
    more often, occurrences are counted: as many come before the answer as in the text that was written.

    Raises:
        BadSample: one is not found.
    """
    found = []
    at = before = 0
    for start, stop in rendered.answers:
        context = _context(rendered.text[before:stop], stop - start, expanded[at:])
        earlier = len(_occurrences(context, rendered.text[before : stop - 1]))
        places = _occurrences(context, expanded[at:])
        if len(places) <= earlier:
            raise BadSample("the processor changes the text around an answer, so that its place is not known")
        at, before = at + places[earlier] + len(context), stop
        found.append((at - (stop - start), at))
    return found


def _context(text: str, least: int, expanded: str) -> str:
    """The longest end of `text`, of at least so many characters, that occurs in `expanded`; what is longer does not."""
    lengths = range(least, len(text) + 1)
    count = bisect.bisect_left(lengths, True, key=lambda length: text[len(text) - length :] not in expanded)
    length = lengths[max(count - 1, 0)]
    return text[len(text) - length :]


def _occurrences(part: str, text: str) -> list[int]:
    """Where `part` begins in `text`, those that overlap included."""
    found = [text.find(part)]
    while found[-1] >= 0:
        found.append(text.find(part, found[-1] + 1))
    return found[:-1]


def _without_pixels(message: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **message,
        "content": [part if part["type"] == "text" else {"type": "image"} for part in message["content"]],
    }


def _write(processor: Any, chat: Sequence[Any], template: str | None, generate: bool = False) -> str:
    text = processor.apply_chat_template(
        list(chat), chat_template=template, tokenize=False, add_generation_prompt=generate
    )
    return str(text)


def _answer(processor: Any, chat: Sequence[Any], turn: int, template: str | None, text: str) -> tuple[int, int]:
    """Of a message of a chat, which is written as `text`."""
    ending = text if turn == len(chat) - 1 else _write(processor, chat[: turn + 1], template)
    written = ending.rstrip()  # what follows the token that ends the turn is the template's
    prompt = _write(processor, chat[:turn], template, generate=True)
    start = len(prompt)
    if not ending.startswith(prompt):  # the template writes something else into a prompt, such as where thinking begins
        said = _said(chat[turn])
        start = written.rfind(said)
        if start < 0 or not said:
            raise BadSample("the chat template changes an answer, so that its place is not known")
    if not text.startswith(written):
        raise BadSample("the chat template writes a turn in another way once more follow")
    return start, len(written)


def _said(message: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"]).strip()


def _is_closed(tokenizer: Any, written: str, message: Mapping[str, Any]) -> bool:
    """Whether a token that is no text follows the answer."""
    tail = written.rpartition(_said(message))[2]
    return any(token in tail for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()))
