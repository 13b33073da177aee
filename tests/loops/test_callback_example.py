"""examples/trainer_callback.py, as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_example_trains_and_prints_the_figures_of_every_log(tmp_path: Path) -> None:
    # its own process and an empty folder; no interpreter of Triton, which a user does not run either
    launch = ("env", "-u", "TRITON_INTERPRET", f"PYTHONPATH={ROOT}", sys.executable)
    done = subprocess.run(
        [*launch, str(ROOT / "examples" / "trainer_callback.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 3
    assert losses[2] < 0.7 * losses[0]
    speeds = [float(speed) for speed in re.findall(r"([\d.]+) tokens/s", done.stdout)]
    assert len(speeds) == 3
    assert min(speeds) > 0
    assert done.stdout.count("    0 steps built logits") == 3
    assert "LlamaForCausalLM: " in done.stdout
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
