"""One warm process for all tests of checkpoints."""

from collections.abc import Iterator

import pytest

from tests.checkpoint.forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()
