"""Chat rows: conversations with tools and reasoning, brought into the shape that templates expect."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from automodel_accel.data.counts import BadRow, shown
from automodel_accel.data.rendered import Rendered, Row, Span, cell
from automodel_accel.data.settings import ChatData
from automodel_accel.data.template import ChatTemplate, Message

COLUMNS = ("messages", "conversations")
# who speaks in ShareGPT's format and its relatives -> the role
SPEAKERS = {
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool"},
    **{"tool_response": "tool", "function_call": "assistant", "tool_call": "assistant"},
}
CALLS = ("function_call", "tool_call")  # who speaks JSON: the name of a function and its arguments
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys under which a message holds it apart


@dataclass(frozen=True, slots=True)
class Conversations:
    """Renders the messages of a row by a chat template."""

    settings: ChatData
    template: ChatTemplate
    with_ends: bool = False

    @classmethod
    def of(cls, settings: ChatData, tokenizer: Any) -> "Conversations":
        """With the tokenizer's template, or the one of the settings."""
        return cls(settings, ChatTemplate.of(tokenizer, settings.chat_template, settings.template_variables))

    @property
    def columns(self) -> tuple[str, ...]:
        """The messages, where they are named; tools are optional."""
        return () if self.settings.messages is None else (self.settings.messages,)

    def __call__(self, row: Row) -> list[Rendered]:
        """The texts of a row."""
        settings = self.settings
        messages = conversation(cell(row, settings.messages or _column(row)))
        tools = _tools(row.get(settings.tools))
        found = self.template.render(messages, tools, assistant_only=settings.assistant_only, history=settings.history)
        return [self._without_reasoning(one, messages) for one in found] if settings.mask_reasoning else found

    def _without_reasoning(self, rendered: Rendered, messages: Sequence[Message]) -> Rendered:
        opening, closing = self.settings.reasoning_markers
        kept = [part for span in rendered.learned for part in without_marked(rendered.text, span, opening, closing)]
        texts = [str(message[key]).strip() for message in messages for key in REASONING if message.get(key)]
        for reasoning in filter(None, texts):
            if any(reasoning in rendered.text[start:stop] for start, stop in kept):
                raise ValueError(
                    f"mask_reasoning: the chat template writes the reasoning {shown(reasoning, 60)}, but not between {opening!r} and "
                    f"{closing!r}; expected reasoning_markers as this template writes them."
                )
        return Rendered(rendered.text, tuple(kept))


def _column(row: Row) -> str:
    """Where nobody has named it."""
    return next((name for name in COLUMNS if row.get(name) is not None), COLUMNS[0])


def without_marked(text: str, span: Span, opening: str, closing: str) -> list[Span]:
    """What is left of a part of a text without all that stands between two markers, the markers, and line breaks after them.

    A space stays with what follows it, of whose first token it is a part. A part that begins right after an opening marker begins inside.
    """
    start, stop = span
    kept = []
    inside = text[:start].rstrip().endswith(opening)
    while start < stop:
        if inside:
            found = text.find(closing, start, stop)
            start = stop if found < 0 else found + len(closing)
            while start < stop and text[start] in "\r\n":
                start += 1
        else:
            found = text.find(opening, start, stop)
            end = stop if found < 0 else found
            if start < end:
                kept.append((start, end))
            start = end
        inside = not inside
    return kept


def conversation(came: Any) -> list[Message]:
    """The messages of a row, up to the last answer.

    Keys that other rows of a table have and this one does not come as None, and are left out; arguments of tool calls that
    are JSON text become what the text says, as templates expect.

    Raises:
        BadRow: no list of messages with a role and a content (or tool calls), or no answer in it.
    """
    messages = _parsed(came)
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadRow("no list of messages", shown(came))
    found = [_message(message) for message in messages]
    answers = [number for number, message in enumerate(found) if message["role"] == "assistant"]
    if not answers:
        raise BadRow("without an answer", f"the roles are {', '.join(message['role'] for message in found)}")
    return found[: answers[-1] + 1]


def _message(message: Any) -> Message:
    if isinstance(message, Mapping) and "from" in message and "role" not in message:
        message = {**without_none(message), "role": message["from"], "content": message.get("value")}
        message = {key: value for key, value in message.items() if key not in ("from", "value")}
    if isinstance(message, Mapping) and message.get("role") in SPEAKERS:
        message = _as_role(message)
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRow("a message without a role", shown(message))
    made: Message = without_none(message)
    if not isinstance(made.get("content"), str | list) and not made.get("tool_calls"):
        raise BadRow("a message without content", shown(message))
    if made.get("tool_calls"):
        made["tool_calls"] = [_tool_call(call) for call in made["tool_calls"]]
    return made


def _as_role(message: Mapping[str, Any]) -> Message:
    role = SPEAKERS[message["role"]]
    if message["role"] not in CALLS:
        return {**message, "role": role}
    made = _parsed(message.get("content"))
    calls = [{"type": "function", "function": call} for call in (made if isinstance(made, list) else [made])]
    return {"role": role, "content": "", "tool_calls": calls}


def _tool_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("a tool call without a function's name", shown(call))
    return {**call, "function": {**function, "arguments": _parsed(function.get("arguments", {}))}}


def _tools(came: Any) -> list[Any] | None:
    tools = _parsed(came)
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("tools that are no list of JSON schemas", shown(came))
    return [without_none(tool) for tool in tools]


def _parsed(value: Any) -> Any:
    """What JSON text says; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadRow("text that is not JSON", f"{error.msg} in {shown(value)}") from error


def without_none(value: Any) -> Any:
    """The value without the keys of dictionaries in it that hold None."""
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list | tuple) else value
