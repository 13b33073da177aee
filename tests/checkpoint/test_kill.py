"""kill -9 at random moments of training and saving: every run goes on, bit by bit, from the last checkpoint that was complete."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from automodel_accel.checkpoint.catalog import LATEST, Entry, entries
from tests.checkpoint.forks import Forks, kill

CASES = [("plain", 1, 43), ("fsdp2", 2, 7)]  # with as many kills
MOST_LINES, MOST_SECONDS = (
    9,
    0.03,
)  # of the life of a run after it has resumed; a step takes a few milliseconds, a save as many


def lines(folder: Path, rank: int) -> list[list[str]]:
    """The whole lines of a record; the last may be cut off."""
    text = (folder / f"record.{rank}").read_text() if (folder / f"record.{rank}").exists() else ""
    return [line.split() for line in text.split("\n")[:-1]]


def check_folder(root: Path) -> Entry | None:
    """Every folder that has the name of a checkpoint is one, each byte as it was written; the last saved one."""
    found, problems = entries(root)
    assert problems == []
    for entry in found:
        entry.check(sorted(entry.files))
    names = {entry.folder.name for entry in found}
    if (root / LATEST).exists():
        assert (root / LATEST).read_text().strip() in names
    return found[0] if found else None


def wait_for(folder: Path, count: int) -> None:
    """Until a record has as many lines."""
    end = time.monotonic() + 120
    while len(lines(folder, 0)) < count:
        assert time.monotonic() < end, (
            f"no more than {len(lines(folder, 0))} lines: {(folder / '0.log').read_text()[-2000:]}"
        )
        time.sleep(0.001)


def wait_for_save(root: Path) -> None:
    """Until something is being written."""
    end = time.monotonic() + 120
    while not any(root.glob("*.partial")):
        assert time.monotonic() < end, "the run does not save"


@pytest.mark.parametrize(("layout", "world", "kills"), CASES)
def test_kill_at_any_moment(forks: Forks, tmp_path: Path, layout: str, world: int, kills: int) -> None:
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    print(f"seed {seed}")  # noqa: T201 - shown where the test fails
    root = tmp_path / "checkpoints"
    during = 0
    for _ in range(kills):
        last = check_folder(root)
        seen = lines(tmp_path, 0)
        pids = forks.start("train_until_killed", tmp_path, world, layout=layout, record="record")
        wait_for(tmp_path, len(seen) + 1 + draw.randrange(MOST_LINES))
        if draw.random() < 0.5:
            wait_for_save(root)
        time.sleep(draw.uniform(0, MOST_SECONDS))
        kill(pids)
        forks.wait(pids)
        resumed = int(lines(tmp_path, 0)[len(seen)][1])
        assert resumed == (0 if last is None else last.step)
        during += any(path.suffix == ".partial" for path in root.glob("*"))
        completed = max((int(line[1]) for line in lines(tmp_path, 0) if line[0] == "complete"), default=0)
        now = check_folder(root)
        assert completed <= (0 if now is None else now.step), "a complete checkpoint is lost"
    found = {rank: dict(steps(tmp_path, rank)) for rank in range(world)}
    most = 1 + max(found[0])
    wanted = forks.run("uninterrupted", tmp_path / "wanted", world, layout=layout, steps=most, dropout=0.1)
    for rank in range(world):
        assert most > kills // 5, "the runs were killed before they did anything"
        for step, (loss, digest) in found[rank].items():
            assert (loss, digest) == (wanted[rank][step][0].hex(), wanted[rank][step][1]), f"step {step}"
    assert during > 0 or kills < 20, "no kill fell into a save"
    print(f"{during} of {kills} kills left a folder half-written; {most} steps")  # noqa: T201 - shown with -s


def steps(folder: Path, rank: int) -> Iterator[tuple[int, tuple[str, str]]]:
    """(step, (loss, digest)); a step that was made again must have given the same."""
    known: dict[int, tuple[str, str]] = {}
    for line in lines(folder, rank):
        if line[0] == "step":
            number, seen = int(line[1]), (line[2], line[3])
            assert known.setdefault(number, seen) == seen, f"step {number} gave another result when it was made again"
            yield number, seen
