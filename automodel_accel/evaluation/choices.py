"""Multiple choice: which of several endings a model holds for the likeliest.

Source: HellaSwag (Zellers et al., 2019), as lm-evaluation-harness asks it (lm_eval/tasks/hellaswag): `acc` by the sum of an ending's
log-probabilities, `acc_norm` by that divided by its length in characters.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class Question:
    """A text, its possible endings, and which of them is right."""

    context: str
    endings: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of right answers.

    Attributes:
        acc: By log-probability.
        acc_norm: By log-probability a character.
        questions: Their number.
    """

    acc: float
    acc_norm: float
    questions: int


@torch.no_grad()
def multiple_choice(
    model: Any, tokenizer: Any, questions: Iterable[Question], batch_size: int = 16, progress: bool = True
) -> Accuracy:
    """Ask all questions; each ending follows its context after a space.

    Raises:
        ValueError: there is no question.
    """
    asked = list(questions)
    if not asked:
        raise ValueError("no questions; expected at least one.")
    pairs = [(question.context, ending) for question in asked for ending in question.endings]
    bar = tqdm(total=len(pairs), desc="endings", disable=None if progress else True)
    scores: list[float] = []
    for start in range(0, len(pairs), batch_size):
        scores += log_probabilities(model, tokenizer, pairs[start : start + batch_size])
        bar.update(min(batch_size, len(pairs) - start))
    bar.close()
    right, right_norm, at = 0, 0, 0
    for question in asked:
        own = scores[at : at + len(question.endings)]
        at += len(question.endings)
        norm = [score / len(ending) for score, ending in zip(own, question.endings, strict=True)]
        right += own.index(max(own)) == question.answer
        right_norm += norm.index(max(norm)) == question.answer
    return Accuracy(right / len(asked), right_norm / len(asked), len(asked))


def log_probabilities(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Of each ending, given its context: the sum over its tokens, in nats."""
    rows = [_tokens(tokenizer, context, ending) for context, ending in pairs]
    longest = max(len(tokens) for tokens, _ in rows)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = torch.tensor([tokens + [padding] * (longest - len(tokens)) for tokens, _ in rows])
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows])
    device = next(model.parameters()).device
    logits = model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return [
        _score(logits[row, start - 1 : len(tokens) - 1], tokens[start:]) for row, (tokens, start) in enumerate(rows)
    ]


def _score(logits: torch.Tensor, tokens: Sequence[int]) -> float:
    found = torch.log_softmax(logits.float(), -1)
    return float(found.gather(-1, torch.tensor(tokens, device=found.device)[:, None]).sum())


def _tokens(tokenizer: Any, context: str, ending: str) -> tuple[list[int], int]:
    """The tokens of both, and where the ending begins; the context's own tokens are those that it has alone."""
    before = tokenizer(context)["input_ids"]
    both = tokenizer(f"{context} {ending}")["input_ids"]
    return both, max(1, min(len(before), len(both) - 1))


def cleaned(text: str) -> str:
    """Without the marks that WikiHow's texts have in HellaSwag."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def questions_of(rows: Iterable[dict[str, Any]]) -> Iterator[Question]:
    """HellaSwag's rows, in the official schema.

    Raises:
        ValueError: a row without one of its columns.
    """
    for number, row in enumerate(rows):
        missing = [name for name in ("activity_label", "ctx_a", "ctx_b", "endings", "label") if name not in row]
        if missing or str(row["label"]) == "":
            raise ValueError(
                f"row {number} has no {(missing or ['label'])[0]!r}; expected HellaSwag's columns, with labels."
            )
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        endings = tuple(cleaned(ending) for ending in row["endings"])
        yield Question(cleaned(context), endings, int(row["label"]))
