"""The host time of an operation, its kernels left out, as a multiple of what torch takes for an autograd function of nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# a ratio, so that it holds on any processor; half as much again as was measured
ALLOWED = {"rms_norm": 6.5, "add_rms_norm": 8.5, "gated_linear": 6, "activation": 5, "rope": 10, "qk_norm_rope": 20}


def test_host_time() -> None:
    command = ["env", "-u", "TRITON_INTERPRET", sys.executable, "-m", "tests.ops.host"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    microseconds = json.loads(done.stdout)
    nothing = microseconds.pop("nothing")
    assert microseconds.keys() == ALLOWED.keys()
    assert {name: time / nothing for name, time in microseconds.items() if time > ALLOWED[name] * nothing} == {}
