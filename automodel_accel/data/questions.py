"""Questions with answers, and texts with endings: instruction data, SQuAD, HellaSwag, documents."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from automodel_accel.data.counts import BadRow, shown
from automodel_accel.data.rendered import Rendered, Row, cell, text_in
from automodel_accel.data.settings import HellaSwagData, InstructionData, SquadData, TextData
from automodel_accel.data.template import ChatTemplate, Message

Pair = tuple[str, str]  # what is given, and what is learned to follow it


@dataclass(frozen=True, slots=True)
class Pairs:
    """Renders a pair of texts, as two messages by a chat template or one behind the other.

    Attributes:
        columns: As for every renderer.
        pair: Row -> what is given and what follows.
        template: The chat template; None for the texts alone.
        answer_only: Whether what is given carries no loss.
    """

    columns: tuple[str, ...]
    pair: Callable[[Row], Pair]
    template: ChatTemplate | None
    answer_only: bool = True

    @property
    def with_ends(self) -> bool:
        """Whether no template writes them."""
        return self.template is None

    def __call__(self, row: Row) -> list[Rendered]:
        """The text of a row."""
        given, answer = self.pair(row)
        if self.template is not None:
            messages: list[Message] = [{"role": "user", "content": given}, {"role": "assistant", "content": answer}]
            return self.template.render(messages, assistant_only=self.answer_only)
        # white space between them belongs to the answer's first token
        start = len(given.rstrip())
        text = given + answer
        return [Rendered(text, ((start if self.answer_only else 0, len(text)),))]


@dataclass(frozen=True, slots=True)
class Documents:
    """Renders texts of which every token carries loss."""

    column: str
    with_ends: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """The text."""
        return (self.column,)

    def __call__(self, row: Row) -> list[Rendered]:
        """The text of a row."""
        text = text_in(row, self.column)
        return [Rendered(text, ((0, len(text)),))]


def of_instructions(settings: InstructionData, tokenizer: Any) -> Pairs:
    """Columns by the roles that the settings give them."""
    template = _template(settings, tokenizer)
    named = settings.columns
    pair = _prompt_and_completion(named) if "prompt" in named else _question_and_answer(named, template is None)
    return Pairs(tuple(named.values()), pair, template, settings.answer_only)


def of_squad(settings: SquadData, tokenizer: Any) -> Pairs:
    """The first answer of each question; a question without one is left out."""
    template = _template(settings, tokenizer)

    def pair(row: Row) -> Pair:
        given = _asked(text_in(row, "context"), text_in(row, "question"), template is None)
        return given, _after(_first_answer(cell(row, "answers")), template is None)

    return Pairs(("context", "question", "answers"), pair, template, settings.answer_only)


def of_hellaswag(settings: HellaSwagData) -> Pairs:
    """The text and its right ending."""
    return Pairs(("ctx", "endings", "label"), _ending, None)


def of_documents(settings: TextData) -> Documents:
    """Texts alone."""
    return Documents(settings.column)


def _template(settings: InstructionData | SquadData, tokenizer: Any) -> ChatTemplate | None:
    has_one = bool(settings.chat_template or getattr(tokenizer, "chat_template", None))
    if settings.style == "plain" or (settings.style == "auto" and not has_one):
        return None
    return ChatTemplate.of(tokenizer, settings.chat_template, settings.template_variables)


def _prompt_and_completion(named: dict[str, str]) -> Callable[[Row], Pair]:
    return lambda row: (text_in(row, named["prompt"]), text_in(row, named["completion"]))


def _question_and_answer(named: dict[str, str], plain: bool) -> Callable[[Row], Pair]:
    def pair(row: Row) -> Pair:
        context = text_in(row, named["context"]) if "context" in named else None
        return _asked(context, text_in(row, named["question"]), plain), _after(text_in(row, named["answer"]), plain)

    return pair


def _asked(context: str | None, question: str, plain: bool) -> str:
    if plain:
        return f"{f'Context: {context}{chr(10)}' if context else ''}Question: {question}\nAnswer:"
    return f"{context}\n\n{question}" if context else question


def _after(answer: str, plain: bool) -> str:
    return f" {answer.lstrip()}" if plain else answer


def _first_answer(answers: Any) -> str:
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str) or not texts[0].strip():
        raise BadRow("without an answer", f"answers is {shown(answers)}")
    return texts[0]


def _ending(row: Row) -> Pair:
    context, endings, label = text_in(row, "ctx"), cell(row, "endings"), cell(row, "label")
    number = int(label) if isinstance(label, int) or (isinstance(label, str) and label.isdecimal()) else -1
    if not isinstance(endings, list) or not 0 <= number < len(endings):
        raise BadRow("without a right ending", f"label is {label!r}, endings {shown(endings)}")
    return context, f" {str(endings[number]).lstrip()}"
