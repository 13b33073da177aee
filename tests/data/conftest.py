"""Nothing of the tests of data is left in the user's cache of data sets."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_of_data_sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of their own, which goes with the other temporary folders."""
    datasets = pytest.importorskip("datasets") if "datasets" in sys.modules else None
    if datasets is None:
        yield
        return
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("data sets")
    yield
    datasets.config.HF_DATASETS_CACHE = before
