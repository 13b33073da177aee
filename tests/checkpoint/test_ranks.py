"""Resuming on other meshes, and layouts that torch's own gathering gets wrong."""

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.forks import Forks

STEPS = 3


@pytest.fixture(scope="module")
def one_process(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Losses and digests of a run that nobody interrupts."""
    found: list[Any] = forks.run("uninterrupted", tmp_path_factory.mktemp("plain"), layout="plain", steps=2 * STEPS)[0]
    return found


@pytest.fixture(scope="module")
def of_four(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that four ranks of FSDP2 saved after STEPS steps."""
    folder = tmp_path_factory.mktemp("four")
    forks.run("save_after", folder, 4, layout="fsdp2", steps=STEPS)
    return folder


@pytest.mark.parametrize(("layout", "world"), [("hsdp", 4), ("fsdp2", 2), ("ddp", 2), ("plain", 1)])
def test_four_ranks_onto_others(forks: Forks, of_four: Path, one_process: list[Any], layout: str, world: int) -> None:
    for losses, _, step, extra in forks.run("resume", of_four, world, layout=layout, steps=STEPS):
        assert (step, extra) == (STEPS, True)
        assert losses == pytest.approx([loss for loss, _ in one_process[STEPS:]], rel=1e-5)


@pytest.mark.parametrize(("layout", "world"), [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("hsdp", 4)])
@pytest.mark.parametrize("kind", ["AdamW"])
def test_same_ranks_go_on_bit_by_bit(forks: Forks, tmp_path: Path, layout: str, world: int, kind: str) -> None:
    went_on = forks.run("save_after", tmp_path, world, layout=layout, steps=STEPS, dropout=0.1, kind=kind)
    resumed = forks.run("resume", tmp_path, world, layout=layout, steps=STEPS, dropout=0.1, kind=kind)
    for (losses, _), (again, _, _, _) in zip(went_on, resumed):
        assert again == losses[STEPS:]


def test_every_layout_is_read_as_every_other(forks: Forks, tmp_path: Path) -> None:
    for found in forks.run("layouts_agree", tmp_path, 4):
        assert [pair for pair, same in found.items() if not same] == []
        assert len(found) == 25


def test_the_example_goes_on_under_ddp(forks: Forks, tmp_path: Path) -> None:
    output = tmp_path / "output"
    forks.run("example", tmp_path / "one", output=str(output), steps=10)
    forks.run("example", tmp_path / "two", 2, output=str(output), steps=20)
    assert (output / "checkpoints" / "LATEST").read_text() == "step-00000020\n"
    assert (output / "model" / "model.safetensors").exists()
    assert "step 20" in (tmp_path / "two" / "0.log").read_text()
    assert "step 10" not in (tmp_path / "two" / "0.log").read_text()
