"""Two processes: DDP and FSDP2 in a loop of torch, the Trainer, accelerate; the checks are in distributed.py."""

from typing import Any

import pytest

from tests.launching import of_each

pytestmark = pytest.mark.slow

LATE = "fsdp2, applied late"
CHECKS = (
    *("plain", "plain, applied late", "plain, own loss"),
    *("fsdp2", "fsdp2, own loss", LATE),
    *("trainer", "trainer, tokens not averaged", "trainer, peft", "accelerate, peft"),
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found, of one launch."""
    return of_each("tests.loops.distributed", tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(found: list[dict[str, Any]], check: str) -> None:
    """Each has other rows, so other losses, and both end with the same weights, which are vanilla's."""
    assert [rank[check]["problem"] for rank in found] == ["", ""]
    assert found[0][check]["weights"] == found[1][check]["weights"]
    assert found[0][check]["losses"] != found[1][check]["losses"]
    for rank in found:
        assert rank[check]["fused"] == (0 if check == LATE else 2 if "own loss" in check else 1)


def test_every_check_is_reported(found: list[dict[str, Any]]) -> None:
    assert tuple(found[0]) == tuple(found[1]) == CHECKS
