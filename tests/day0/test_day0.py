"""The promise of day 0: every architecture that transformers ships is served by its structure, and never wrong."""

from collections.abc import Sequence

import pytest
import transformers

from tests.day0.coverage import LEAST, PAGE, changes, count, load, page
from tests.day0.sweep import Outcome, sweep

KINDS = ("causal", "vlm")
CHECKS = ("parity", "revert")  # the others take minutes: make day0
TRAINED = {"causal": 185, "vlm": 93}
WITH_IMAGE = 84

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes() -> Sequence[Outcome]:
    return sorted(sweep(KINDS, CHECKS), key=lambda found: (found.kind, found.name))


def test_loss_and_every_gradient_are_vanillas_everywhere(outcomes: Sequence[Outcome]) -> None:
    assert {f"{found.kind}/{found.name}": found.wrong for found in outcomes if found.wrong} == {}


def test_the_zoo_is_large(outcomes: Sequence[Outcome]) -> None:
    built = [found for found in outcomes if found.unbuildable is None]
    for kind, least in TRAINED.items():
        assert sum(found.kind == kind for found in built) >= least, kind
    assert sum(found.image for found in built if found.kind == "vlm") >= WITH_IMAGE


@pytest.mark.parametrize("what", LEAST)
def test_what_is_served_may_only_grow(outcomes: Sequence[Outcome], what: str) -> None:
    for kind, least in zip(KINDS, LEAST[what], strict=True):
        assert count(outcomes, kind, what) >= least, kind


def test_the_page_says_what_is_served(outcomes: Sequence[Outcome]) -> None:
    """After a change: `make day0 ARGS=--write`."""
    version, before = load()
    if version == transformers.__version__:
        assert list(changes(before, outcomes)) == []
        assert PAGE.read_text(encoding="utf-8") == page(before)
