"""Who is missing is named."""

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from automodel_accel.parallel.mesh import Mesh
from automodel_accel.parallel.presence import Presence, assemble

SHORT = timedelta(seconds=0.3)


def key(rank: int) -> str:
    return f"automodel_accel/step/{rank}"


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_all_come() -> None:
    store = dist.HashStore()
    threads = [threading.Thread(target=assemble, args=(store, rank, 3, timedelta(seconds=20))) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    assemble(store, 0, 3, timedelta(seconds=20))
    for thread in threads:
        thread.join()


def test_those_that_do_not_come_are_named() -> None:
    store = dist.HashStore()
    store.set("automodel_accel/here/2", "node")
    with pytest.raises(TimeoutError, match=r"ranks 1, 3 of 4 had not come"):
        assemble(store, 0, 4, SHORT)


def test_the_one_that_holds_a_run_up_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    store = dist.HashStore()
    ranks = [Presence(store, rank, 3, SHORT, look_seconds=0.02) for rank in range(3)]
    store.set("automodel_accel/here/1", "node7")
    with (
        caplog.at_level(logging.ERROR, "automodel_accel"),
        ranks[0].watching(),
        ranks[1].watching(),
        ranks[2].watching(),
    ):
        for one in ranks:
            one.begin(2)
        until(lambda: all(store.check([key(rank)]) and store.get(key(rank)) == b"2" for rank in range(3)))
        ranks[0].begin(3)
        ranks[2].begin(3)
        until(lambda: len(caplog.records) == 2)
        time.sleep(0.1)  # and no more
    said = sorted(record.getMessage() for record in caplog.records)
    assert len(said) == 2
    assert said[0].startswith("rank 0 waits at step 3")
    assert said[1].startswith("rank 2 waits at step 3")
    assert all("for rank 1 on node7, which has come to step 2 only" in line for line in said)


def test_nobody_is_named_while_all_are_at_the_same_step(caplog: pytest.LogCaptureFixture) -> None:
    """A long validation, or a long save."""
    store = dist.HashStore()
    ranks = [Presence(store, rank, 2, SHORT, look_seconds=0.02) for rank in range(2)]
    with caplog.at_level(logging.ERROR, "automodel_accel"), ranks[0].watching(), ranks[1].watching():
        for one in ranks:
            one.begin(7)
        time.sleep(0.5)
    assert not caplog.records


def test_a_mesh_waits_for_its_ranks_and_names_the_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun sets it up: the store is the agent's."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    named = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in {**named, "TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        TimeoutError, match=r"after 0.02 minutes rank 1 of 2 had not come; look at the log of their machines"
    ):
        Mesh(timeout_minutes=0.02).ranks("cpu")
    assert not dist.is_initialized()
