"""The loops among the examples, and launchers in front of `automodel_accel.run`."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, default_collate

import automodel_accel as accel
from tests.loops.processes import ROOT, RUN, SCRIPTS, python
from tests.loops.scripts import raw_ddp

LAUNCH = (
    "-m",
    "accelerate.commands.launch",
    "--cpu",
    "--num_processes",
    "1",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
)
TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
)  # what accelerate launches on several GPUs
EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES))
import accelerate_loop
import unchanged_script


@pytest.fixture(autouse=True)
def own_accelerate_state() -> Iterator[None]:
    """accelerate keeps one state a process, which forbids another setting."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def figures(text: str) -> list[float]:
    """Losses and gradient norms, in the order in which they were printed."""
    return [float(number) for number in re.findall(r"(?:loss'|norm'|before|after|loss:)\D{0,4}(\d+\.\d+)", text)]


def test_unchanged_script_under_accelerate_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ordinary script with a Trainer: the same losses with and without, and the report says what was done."""
    own = [
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
        "--max_steps",
        "8",
        "--logging_steps",
        "1",
        "--disable_tqdm",
        "1",
    ]
    script, report = EXAMPLES / "unchanged_script.py", tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", [str(script), *own])
    unchanged_script.main()
    plain = capsys.readouterr().out
    ours = python(*LAUNCH, *RUN, script, *own, f"--accel.report={report}", "--accel.rope=false")
    assert ours.code == 0, ours.errors
    assert len(figures(plain)) >= 16
    assert figures(ours.output) == pytest.approx(figures(plain), rel=2e-3), "printed with four digits"
    (line,) = ours.lines
    assert line.startswith("LlamaForCausalLM: ")
    (done,) = json.loads(report.read_text())
    assert {claim["fusion"] for claim in done["applied"]} >= {"norm", "mlp", "loss"}
    assert "rope" not in {claim["fusion"] for claim in done["applied"]}
    assert done["calls"]["loss"] > 8, "in each step more than one batch"
    assert done["materialised_logits"] == 0


def test_two_processes_with_ddp() -> None:
    """A plain loop that wraps in DDP, on two processes, against one vanilla process with all rows."""
    ours = python(*TORCHRUN, *RUN, SCRIPTS / "raw_ddp.py", "--processes", "2")
    assert ours.code == 0, ours.errors
    expected, got = raw_ddp.train(processes=1, rank=0, lr=0.2), json.loads(ours.output)
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert got["weights"] == pytest.approx(expected["weights"], rel=1e-5)
    (line,) = ours.lines  # of the first process only
    assert line.startswith("LlamaForCausalLM: ")


def test_accelerate_loop_counts_each_label_once() -> None:
    """A step over batches with uneven numbers of labels is the step over all their rows at once."""
    examples = accelerate_loop.build_examples(6)
    batches = [default_collate(examples[:1]), default_collate(examples[1:3]), default_collate(examples[3:])]
    steps: list[tuple[Any, dict[str, torch.Tensor]]] = []
    for given, is_ours in ((batches, True), ([default_collate(examples)], False)):
        torch.manual_seed(0)
        model = accelerate_loop.build_model()
        if is_ours:
            accel.apply(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss = accelerate_loop.training_step(Accelerator(cpu=True), model, optimizer, given)
        steps.append((loss, {name: part.detach() for name, part in model.named_parameters()}))
    (loss, parameters), (whole_loss, whole_parameters) = steps
    assert loss.item() == pytest.approx(whole_loss.item(), rel=1e-5)
    for name, part in parameters.items():
        torch.testing.assert_close(part, whole_parameters[name], rtol=1e-4, atol=1e-6)


def test_accelerate_loop_learns(capsys: pytest.CaptureFixture[str]) -> None:
    accelerate_loop.main()
    printed = capsys.readouterr().out
    losses = [float(number) for number in re.findall(r"loss (\d+\.\d+)", printed)]
    assert len(losses) == 16
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert "places swapped and proved" in printed
    assert re.search(r"materialised logits\s+0\n", printed)


def test_accelerate_loop_keeps_the_last_batches() -> None:
    loader: Any = DataLoader(accelerate_loop.build_examples(10), batch_size=2)
    assert [len(group) for group in accelerate_loop.groups(loader)] == [4, 1]
