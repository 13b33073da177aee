"""Distillation of students that are spread over ranks: the loss and the gradients of one process."""

from pathlib import Path

import pytest

from tests.launching import of_each
from tests.train.distillation_ranks import CASES


@pytest.mark.slow
def test_spread_students_equal_one_process(tmp_path: Path) -> None:
    assert of_each("tests.train.distillation_ranks", tmp_path) == [dict.fromkeys(CASES, "")] * 2
