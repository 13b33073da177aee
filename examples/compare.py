"""Run finetune.py accelerated and vanilla, each in its own process, and compare the two in tables and a picture."""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from automodel_accel.kernels.facts import this_machine

SCRIPT = Path(__file__).parent / "finetune.py"
PACKAGES = ("torch", "transformers", "peft", "tokenizers")
# glibc then gives every large tensor's memory back at once; by default the peak of one program varies by a tenth
STEADY_MEMORY = ("env", "MALLOC_MMAP_THRESHOLD_=1048576")
SHARED_MACHINE = 0.9  # processor time over seconds, below which other programs distort the seconds
GB = 1e9
# label, name of the figure, its unit, how to show it
ROWS = (
    ("training, seconds", "seconds", 1, ".1f"),
    ("processor time, seconds", "processor_seconds", 1, ".1f"),
    ("one step (median), seconds", "seconds_per_step", 1, ".3f"),
    ("tokens per second", "tokens_per_second", 1, ".0f"),
    ("peak memory, GB", "peak_memory_bytes", GB, ".2f"),
    ("of which training added, GB", "training_memory_bytes", GB, ".2f"),
)


def both_variants(options: argparse.Namespace) -> int:
    """Run both, print what came out, and write figures.json and loss.png. Returns the exit code."""
    output = Path(options.output)
    figures: dict[str, Any] = {"options": vars(options), "machine": machine()}
    for variant in ("accelerated", "vanilla"):
        own = ["--model", options.model, "--variant", variant]
        command = [*STEADY_MEMORY, sys.executable, str(SCRIPT), *sys.argv[1:], *own]
        # a session of its own: Ctrl-C reaches this process alone, which then ends the other one
        code = subprocess.run(command, check=False, start_new_session=True).returncode
        if code < 0:
            print(f"error: signal {-code} ended the {variant} run (9: the machine ran out of memory).", file=sys.stderr)
        if code != 0:
            return abs(code)
        figures[variant] = _take_figures(output, variant)
    vanilla, accelerated = figures["vanilla"], figures["accelerated"]
    figures["largest_loss_difference"] = largest_difference(vanilla["losses"], accelerated["losses"])

    console = Console(highlight=False, markup=False)
    console.print(answer_table(accelerated["answers"]))
    console.print(comparison_table(vanilla, accelerated, options.steps))
    console.print(closing_lines(figures))

    (output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    written = {"adapter_model.safetensors": "the adapter, in PEFT's own format", "figures.json": "all figures"}
    if this_machine().has("matplotlib"):
        draw(output / "loss.png", figures, Path(options.model).name)
        written["loss.png"] = "the loss curves"
    else:
        console.print("No picture: matplotlib is not installed.")
    for name, what in written.items():
        console.print(f"{output / name}: {what}", soft_wrap=True)
    return 0


def write_figures(output: str, variant: str, figures: dict[str, Any]) -> None:
    """Hand the figures of one variant to the process that compares."""
    Path(output).mkdir(parents=True, exist_ok=True)
    (Path(output) / f"{variant}.json").write_text(json.dumps(figures), encoding="utf-8")


def _take_figures(output: Path, variant: str) -> Any:
    path = output / f"{variant}.json"
    figures = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return figures


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with which versions."""
    facts = this_machine()
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "system": platform.platform(),
        "python": facts.python,
        "device": facts.device,
        "device_name": facts.device_name,
        "arch": facts.arch,
        "versions": versions,
    }


def largest_difference(vanilla: list[float], accelerated: list[float]) -> dict[str, float]:
    """The step (counted from 1) at which two loss curves differ most, and by how much."""
    differences = [abs(one - other) for one, other in zip(vanilla, accelerated, strict=True)]
    worst = max(range(len(differences)), key=differences.__getitem__)
    return {"difference": differences[worst], "step": worst + 1}


def answer_table(answers: list[dict[str, Any]]) -> Table:
    """Every question with the answers before and after training."""
    table = Table(title="Answers", title_justify="left", box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    for item in answers:
        table.add_row("asked", item["question"])
        table.add_row("before", item["before"])
        table.add_row("after", item["after"])
        if "held_out_answer" in item:
            table.add_row("held out", item["held_out_answer"])
        table.add_section()
    return table


def comparison_table(vanilla: dict[str, Any], accelerated: dict[str, Any], steps: int) -> Table:
    """What was measured, side by side."""
    title = f"The same {steps} steps, vanilla and accelerated"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("vanilla", "accelerated", "change"):
        table.add_column(name, justify="right")
    for label, name, unit, form in ROWS:
        one, other = vanilla[name], accelerated[name]
        table.add_row(label, format(one / unit, form), format(other / unit, form), f"{other / one - 1:+.0%}")
    return table


def closing_lines(figures: dict[str, Any]) -> str:
    """The losses, in words, and a warning where the seconds say little."""
    worst, accelerated = figures["largest_loss_difference"], figures["accelerated"]
    held_out = accelerated["held_out_loss"]
    lines = [
        f"Held-out loss: {held_out['before']:.3f} before training, {held_out['after']:.3f} after.",
        f"Largest difference between the two training losses: {worst['difference']:.1e}, at step {worst['step']}.",
        f"Logits built by the accelerated training: {accelerated['report']['materialised_logits']} times.",
    ]
    busy = min(
        figures[variant]["processor_seconds"] / figures[variant]["seconds"] for variant in ("vanilla", "accelerated")
    )
    if busy < SHARED_MACHINE:
        lines.append("The process had to wait for a processor: go by the processor time, not by the seconds.")
    return "\n".join(lines) + "\n"


def draw(path: Path, figures: dict[str, Any], model: str) -> None:
    """The loss curves of both variants with the held-out losses, and below them the difference of the two."""
    from matplotlib.figure import Figure  # an optional package, and slow to import

    vanilla, accelerated = figures["vanilla"]["losses"], figures["accelerated"]["losses"]
    held_out = figures["accelerated"]["held_out_loss"]
    steps = range(1, len(vanilla) + 1)
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot(steps, vanilla, color="#f0a030", linewidth=5, alpha=0.6, label="training, vanilla")
    above.plot(steps, accelerated, color="#1f4e79", linewidth=1.5, label="training, accelerated")
    ends = [0, len(vanilla)], [held_out["before"], held_out["after"]]
    above.plot(*ends, "D", color="#b03060", label="held-out, before and after")
    above.set_ylabel("loss per answer token (nats)")
    above.set_ylim(bottom=0)
    above.set_title(f"LoRA fine-tuning of {model}")
    above.legend()
    differences = [other - one for one, other in zip(vanilla, accelerated, strict=True)]
    below.axhline(0, color="#999999", linewidth=0.8)
    below.plot(steps, differences, color="#1f4e79", marker=".", linewidth=1)
    below.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0))
    below.set_ylabel("accelerated\nminus vanilla")
    below.set_xlabel("step")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
