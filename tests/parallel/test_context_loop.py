"""Two processes: rows that are cut, token counts, the optimizer in backward; the checks are in context_ranks.py."""

import pytest

from tests.launching import of_each

pytestmark = pytest.mark.slow

CHECKS = (
    "llama, plain",
    "llama, padded left",
    "llama, packed",
    "llama, five tokens",
    "qwen3",
    "mistral, windows",
    "gemma2, soft-caps",
    "llama, bfloat16",
    "llama, adapted",
    "llama, FSDP2",
    "no waits",
    "different rows",
    "mutant: the mask has no offset",
    "mutant: pieces in another order",
    "mutant: gradients of keys and values are not summed",
    "mutant: labels are not shifted before the cut",
    "mutant: the mean over a rank's own labels",
    "tokens",
    "mutant: tokens without the factor",
    "mutant: tokens of one rank",
    "tokens, cut",
    "in backward, AdamW",
    "in backward, SGD",
    "in backward, clipped",
    "in backward, copies",
)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of the two processes found, of one launch."""
    return of_each("tests.parallel.context_ranks", tmp_path_factory.mktemp("context"))


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(problems: list[dict[str, str]], check: str) -> None:
    assert [rank[check] for rank in problems] == ["", ""]


def test_every_check_is_reported(problems: list[dict[str, str]]) -> None:
    assert tuple(problems[0]) == tuple(problems[1]) == CHECKS
