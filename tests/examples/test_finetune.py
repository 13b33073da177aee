"""The demo from end to end, and what it says to wrong input."""

import functools
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import finetune
import psutil
import pytest
import torch
from peft import PeftModel

from tests.examples.conftest import EXAMPLES

ROOT = EXAMPLES.parent
# `python -m` would put the examples out of reach of each other; the script needs the checkout on its path
LAUNCH = ("env", f"PYTHONPATH={ROOT}", sys.executable)
SCRIPT = str(EXAMPLES / "finetune.py")
DRAWS = importlib.util.find_spec("matplotlib") is not None
FLAGS = ("--steps", "3", "--batch-size", "2", "--rank", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def demo(chat_model: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What one run of the demo printed, and its output folder."""
    output = tmp_path_factory.mktemp("demo")
    given = ("--model", str(chat_model), "--data", str(chat_data), "--question", "What colour is a fig?")
    command = [*LAUNCH, SCRIPT, *given, *FLAGS, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "accelerated: 100%" in done.stderr
    assert "vanilla: 100%" in done.stderr
    return done.stdout, output


def test_demo_prints_the_plan_first_and_the_comparison_last(demo: tuple[str, Path]) -> None:
    printed, output = demo
    order = [
        "no answer is in both",
        "Plan for",
        "Answers",
        "What colour is a fig?",
        "peak memory",
        "Held-out loss",
        "loss.png" if DRAWS else "No picture: matplotlib is not installed",
    ]
    places = [printed.index(text) for text in order]
    assert places == sorted(places)
    written = {path.name for path in output.iterdir()}
    assert written >= {"adapter_config.json", "adapter_model.safetensors", "figures.json"}
    assert ("loss.png" in written) == DRAWS


def test_demo_figures_are_those_of_two_equal_trainings(demo: tuple[str, Path]) -> None:
    figures = json.loads((demo[1] / "figures.json").read_text(encoding="utf-8"))
    vanilla, accelerated = figures["vanilla"], figures["accelerated"]
    assert len(vanilla["losses"]) == len(accelerated["losses"]) == 3
    differences = [abs(one - other) for one, other in zip(vanilla["losses"], accelerated["losses"], strict=True)]
    assert figures["largest_loss_difference"] == {
        "difference": max(differences),
        "step": differences.index(max(differences)) + 1,
    }
    assert max(differences) < 1e-4
    assert accelerated["losses"][0] != accelerated["losses"][2]
    for variant in (vanilla, accelerated):
        assert 0 < variant["seconds_per_step"] < variant["seconds"]
        assert variant["peak_memory_bytes"] > variant["training_memory_bytes"] > 0
        assert variant["tokens_per_second"] > 0
        assert variant["processor_seconds"] > 0
    assert accelerated["report"]["materialised_logits"] == 0
    assert accelerated["report"]["calls"]["loss"] == 3
    assert {claim["fusion"] for claim in accelerated["report"]["applied"]} == {
        "norm",
        "mlp",
        "rope",
        "attention",
        "residual",
        "linear",
        "loss",
    }
    assert "report" not in vanilla
    assert figures["machine"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert figures["options"]["rank"] == 4
    assert [set(item) for item in accelerated["answers"]] == [
        {"question", "before", "after"},
        {"question", "before", "after", "held_out_answer"},
    ]


def test_demo_adapter_loads_into_an_untouched_model(
    demo: tuple[str, Path], chat_model: Path, chat_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = json.loads((demo[1] / "figures.json").read_text(encoding="utf-8"))["accelerated"]["held_out_loss"]
    given = ["--model", str(chat_model), "--data", str(chat_data), *FLAGS, "--variant", "vanilla"]
    job = finetune.prepare(finetune.parse_options(given))
    assert finetune.held_out_loss(job.model, job) == pytest.approx(figures["before"], rel=1e-5)
    model = PeftModel.from_pretrained(job.model, demo[1])
    assert finetune.held_out_loss(model, job) == pytest.approx(figures["after"], rel=1e-5)
    assert figures["before"] != pytest.approx(figures["after"], rel=1e-3)


def test_demo_picture_shows_both_curves(demo: tuple[str, Path]) -> None:
    image = pytest.importorskip("matplotlib.image").imread(demo[1] / "loss.png")
    assert image.shape[0] >= 600
    assert image.shape[1] >= 800
    colours = {tuple(colour) for colour in (image[..., :3] * 255).round().astype(int).reshape(-1, 3)}
    assert (0x1F, 0x4E, 0x79) in colours, "the accelerated curve"
    assert (0xB0, 0x30, 0x60) in colours, "the held-out points"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "./no/such/folder"], "no such folder"),
        (["--model", "{empty}"], "--model"),
        (["--model", "{no_template}"], "no chat template"),
        (["--data", "no/such.jsonl"], "no such file"),
        (["--data", "{bad}"], "bad.jsonl, line 1: keys 'text'; expected"),
        (["--data", "{few}"], "too few rows (2)"),
        (["--batch-size", "99"], "too few rows (12)"),
        (["--max-length", "3"], "too few rows (12)"),
    ],
)
def test_wrong_input_is_one_sentence(
    flags: list[str],
    told: str,
    chat_model: Path,
    chat_data: Path,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "hello"}\n', encoding="utf-8")
    (tmp_path / "few.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2, encoding="utf-8")
    (tmp_path / "no_template").mkdir()
    for file in chat_model.iterdir():
        if "chat_template" not in file.name:
            (tmp_path / "no_template" / file.name).write_bytes(file.read_bytes())
    places = {name.split(".")[0]: str(tmp_path / name) for name in ("empty", "bad.jsonl", "few.jsonl", "no_template")}
    given = [*FLAGS, "--model", str(chat_model), "--data", str(chat_data), "--output", str(tmp_path / "out")]
    asked = [flag.format(**places) for flag in flags]
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--variant", "vanilla", *given, *asked])
    assert finetune.main() == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert told in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="--device cpu"):
        finetune.pick_device("cuda")


def test_wrong_input_ends_the_whole_demo_with_code_2(chat_model: Path, tmp_path: Path) -> None:
    given = ("--model", str(chat_model), "--data", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "out"))
    done = subprocess.run([*LAUNCH, SCRIPT, *given], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    *others, said = done.stderr.splitlines()
    assert said.startswith("error: ")
    assert all("kernels-community" in line for line in others), (
        "what bitsandbytes says as it is imported, and nothing else"
    )


def test_a_stopped_demo_leaves_no_process_and_no_traceback(chat_model: Path, chat_data: Path, tmp_path: Path) -> None:
    given = ("--model", str(chat_model), "--data", str(chat_data), "--output", str(tmp_path / "out"))
    command = [*LAUNCH, SCRIPT, *given, *FLAGS, "--steps", "1000000"]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, **pipes, preexec_fn=heed) as running:
        assert running.stderr is not None
        said = ""
        while "loss=" not in said:
            character = running.stderr.read(1)
            assert character, said
            said += character
        children = psutil.Process(running.pid).children(recursive=True)
        assert children
        running.send_signal(signal.SIGINT)
        said += running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert "Traceback" not in said
    assert said.endswith("Stopped.\n")
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_help_shows_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        finetune.parse_options(["--help"])
    assert end.value.code == 0
    assert "example: python examples/finetune.py" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--steps", "0"], ["--batch-size", "two"], ["--device", "tpu"], ["--stpes", "3"]])
def test_wrong_flags_end_with_code_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        finetune.parse_options(flags)
    assert end.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_one_line_example_runs() -> None:
    done = subprocess.run(
        [*LAUNCH, str(EXAMPLES / "one_line.py")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "places swapped and proved" in done.stdout
