"""Settings of data as recipes write them."""

from dataclasses import dataclass, field

import pytest

from automodel_accel.data import Batching, BinData, ChatData, DataSettings, InstructionData, SquadData, TextData
from automodel_accel.recipes.filling import fill, to_yaml
from automodel_accel.recipes.reading import RecipeError, parse


@dataclass(frozen=True, kw_only=True)
class Part:
    """As a recipe has it."""

    data: DataSettings
    batching: Batching = field(default_factory=Batching)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("{kind: squad, limit: 500}", SquadData(limit=500)),
        (
            "{kind: chat, path: a.jsonl, history: mask, template_variables: {enable_thinking: false}}",
            ChatData(path="a.jsonl", history="mask", template_variables={"enable_thinking": False}),
        ),
        (
            "{kind: instruction, path: a/b, columns: {prompt: p, completion: c}, too_long: truncate}",
            InstructionData(path="a/b", columns={"prompt": "p", "completion": "c"}, too_long="truncate"),
        ),
        ("{kind: text, path: c4, streaming: true, too_long: split}", TextData(path="c4", streaming=True)),
        ("{kind: bins, path: 'train*.bin', document_end: 50256}", BinData(path="train*.bin", document_end=50256)),
    ],
)
def test_kinds(text: str, made: DataSettings) -> None:
    part = fill(Part, parse(f"data: {text}", "r.yaml"))
    assert part == Part(data=made)
    assert fill(Part, parse(to_yaml(part), "r.yaml")) == part


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {kind: chats, path: a}", "Did you mean 'chat'"),
        ("data: {kind: chat, path: a, too_long: split}", "unknown value 'split'"),
        ("data: {kind: chat, path: a, histry: mask}", "Did you mean 'history'"),
        ("data: {kind: chat, path: a, assistant_only: false, history: mask}", "puts loss on every token"),
        ("data: {kind: chat, path: a, reasoning_markers: ['<t>']}", "expected two texts"),
        ("data: {kind: mock, vocab_size: 0}", "1 word"),
        ("{data: {kind: squad}, batching: {packing: true, group_by_length: true}}", "packed rows have none"),
    ],
)
def test_mistakes_have_a_place(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=f"r.yaml.*{said}"):
        fill(Part, parse(text, "r.yaml"))
