"""Chat templates: a conversation as text, and which part of that text the assistant wrote.

A template that marks it with {% generation %} is believed. Of any other one, the part of answer k is what the conversation up to
that answer has more than the prompt before it: prompt(k) = the template on messages[:k] with the assistant's header, turn(k) = the
template on messages[:k + 1]. That is right only where both are beginnings of the whole text, which is looked at for each answer: a
template that writes history in another way than a last answer (it drops reasoning, it moves the tools) is refused in words.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from automodel_accel.data.counts import BadRow, shown
from automodel_accel.data.rendered import Rendered, Span

Message = dict[str, Any]
History = Literal["learn", "mask", "split"]
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers recognises them
MARKS = "a chat_template with {% generation %} and {% endgeneration %} around what the assistant writes"


@dataclass(frozen=True)
class ChatTemplate:
    """A template with all that it reads beside the messages.

    Attributes:
        tokenizer: Whose it is, with its special tokens.
        given: The text of a template instead of the tokenizer's own.
        variables: Name -> value, for the template.
    """

    tokenizer: Any
    given: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any, given: str | None, variables: Mapping[str, Any]) -> "ChatTemplate":
        """The tokenizer's template, or the one given as text or by a path.

        Raises:
            ValueError: there is none, no such file, or the tokenizer is not a fast one.
        """
        if not given and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which writes a conversation as text. Take one of an "
                "instruction-tuned model, or give chat_template: its text, or the path of a file with it."
            )
        if given and "{{" not in given and "{%" not in given:
            if not Path(given).is_file():
                raise ValueError(
                    f"chat_template {shown(given)}: no such file, and no Jinja template either, which has {{{{ or {{%."
                )
            given = Path(given).read_text(encoding="utf-8")
        return cls(tokenizer, given, variables)

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        *,
        assistant_only: bool = True,
        history: History = "learn",
    ) -> list[Rendered]:
        """A conversation as text: one, or with history="split" one an answer.

        Args:
            messages: The last one is the assistant's.
            tools: Their JSON schemas.
            assistant_only: Whether only what the assistant wrote carries loss.
            history: What becomes of answers before the last one, see `ChatData`.

        Raises:
            BadRow: the template refuses the conversation.
            ValueError: the template does not show which part the assistant wrote.
        """
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            if not assistant_only:
                text = self.text(messages, tools)
                return [Rendered(text, ((0, len(text)),))]
            if history == "split":
                return [self._learning_from(messages[: last + 1], tools, [last]) for last in answers]
            return [self._learning_from(messages, tools, answers if history == "learn" else answers[-1:])]
        except (TemplateError, TypeError, KeyError) as error:
            raise BadRow("refused by the chat template", f"{error}: {shown(messages)}") from error

    def text(self, messages: Sequence[Message], tools: list[Any] | None, add_generation_prompt: bool = False) -> str:
        """What the template writes."""
        return self.tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            list(messages),
            tools=tools,
            chat_template=self.given,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.variables,
        )

    def source(self, tools: list[Any] | None) -> str:
        """The text of the template itself: a tokenizer may have one of its own for tools."""
        return self.given or str(self.tokenizer.get_chat_template(None, tools))

    def _learning_from(self, messages: Sequence[Message], tools: list[Any] | None, answers: list[int]) -> Rendered:
        if MARKERS.search(self.source(tools)):
            return self._by_markers(messages, tools, len(answers) == 1)
        text = self.text(messages, tools)
        return Rendered(text, tuple(self._by_prefixes(text, messages, tools, number) for number in answers))

    def _by_markers(self, messages: Sequence[Message], tools: list[Any] | None, last_only: bool) -> Rendered:
        text, spans = self._marked(messages, tools)
        if not spans:
            raise ValueError(
                "the chat template has {% generation %} markers, but marked nothing in a conversation with an answer: "
                f"{shown(list(messages))}; expected them around what the assistant writes."
            )
        if last_only:  # those that came with the last message
            before = len(self._marked(messages[:-1], tools)[1]) if any(_is_answer(one) for one in messages[:-1]) else 0
            spans = spans[before:]
        return Rendered(text, tuple(spans))

    def _marked(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        without_nothing = [{key: value for key, value in one.items() if value is not None} for one in messages]
        rendered: Any = render_jinja_template(  # typed as if it gave the text alone
            conversations=[without_nothing],
            tools=tools,
            chat_template=self.source(tools),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.variables},
        )
        [text], [spans] = rendered
        return text, [(start, stop) for start, stop in spans if start < stop]

    def _by_prefixes(self, text: str, messages: Sequence[Message], tools: list[Any] | None, answer: int) -> Span:
        prompt = self.text(messages[:answer], tools, add_generation_prompt=True)
        is_last = answer == len(messages) - 1
        turn = text if is_last else self.text(messages[: answer + 1], tools)
        for written, what in ((prompt, "the prompt before it"), (turn, "the conversation up to it")):
            if not text.startswith(written):
                raise ValueError(_not_a_prefix(what, written, text, answer, is_last))
        return len(prompt), self._without_space_after_end(text, len(prompt), len(turn))

    def _without_space_after_end(self, text: str, start: int, stop: int) -> int:
        """Where the answer ends: a line break after the end-of-turn token is the template's, and no part of it."""
        stripped = text[start:stop].rstrip()
        return start + len(stripped) if stripped.endswith(self._added_tokens) else stop

    @functools.cached_property
    def _added_tokens(self) -> tuple[str, ...]:
        return tuple({*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens})


def _is_answer(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _not_a_prefix(what: str, written: str, text: str, answer: int, is_last: bool) -> str:
    same = next(
        (at for at, (one, other) in enumerate(zip(written, text)) if one != other), min(len(written), len(text))
    )
    remedy = (
        f"Give {MARKS}."
        if is_last
        else 'Set history: "split" (one sample an answer, each as the model will see it) or "mask" (learn from the last answer '
        f"only); or give {MARKS}."
    )
    return (
        f"the chat template writes {what}, message {answer}, in another way once the rest of the conversation follows: first "
        f"{shown(written[same : same + 40])}, then {shown(text[same : same + 40])}. So what the assistant wrote cannot be told from "
        f"the rest. {remedy}"
    )
