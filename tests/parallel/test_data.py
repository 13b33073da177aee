"""Two processes: parameters and gradients over data ranks; the checks are in data.py."""

import pytest

from tests.launching import of_each

pytestmark = pytest.mark.slow

CHECKS = (
    *(
        "ways",
        "compiled",
        "summed_once",
        "low_precision",
        "clipped",
        "on_meta",
        "cut_on_meta",
        "from_a_folder",
        "drawn",
        "bad_checkpoints",
    ),
    *("saved", "evaluated", "same_values", "after_apply"),
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of the two processes found, of one launch."""
    return of_each("tests.parallel.data", tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(found: list[dict[str, str]], check: str) -> None:
    assert [rank[check] for rank in found] == ["", ""]


def test_every_check_is_reported(found: list[dict[str, str]]) -> None:
    assert tuple(found[0]) == tuple(found[1]) == CHECKS
