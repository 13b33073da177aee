"""Two processes that train adapters with dropout: DDP, and FSDP2 with the adapters in shards or whole; see lora_distributed.py."""

from typing import Any

import pytest

from tests.launching import of_each

pytestmark = pytest.mark.slow

WRAPS = ("DDP", "FSDP2", "FSDP2, adapters whole")
STEPS, CALLS = 4, 8  # of a step: two layers, four inputs of adapted linears each


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found, of one launch."""
    return of_each("tests.swap.lora_distributed", tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("wrap", WRAPS)
def test_two_processes(found: list[dict[str, Any]], wrap: str) -> None:
    """Gradients, losses and what a resumed training does are PEFT's; each process has masks of its own."""
    first, second = (rank[wrap] for rank in found)
    assert (first["problem"], second["problem"]) == ("", "")
    assert first["loss by one seed"] == second["loss by one seed"], "the same rows and the same masks"
    assert all(one != other for one, other in zip(first["losses"], second["losses"], strict=True))
    assert first["gradients"] == second["gradients"]
    assert first["fused"] == second["fused"] == STEPS * CALLS


def test_every_way_is_reported(found: list[dict[str, Any]]) -> None:
    assert tuple(found[0]) == tuple(found[1]) == WRAPS
