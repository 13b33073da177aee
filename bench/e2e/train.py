"""Train one variant in this process; used by `bench.e2e.compare` in a process of its own.

Reads a request as JSON from its argument: the jobs to run one after the other, the seeds by which to move the weights for
further trainings of each, and where to read the documents and to write what came out.
"""

import gc
import importlib
import importlib.metadata
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from automodel_accel.kernels.facts import this_machine
from bench.e2e import documents
from bench.e2e.job import Job, Measurement
from bench.e2e.variants import OURS, fill, move_by_a_rounding, parse

LINUX_STATUS = Path("/proc/self/status")
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate")
SAMPLE = 4096  # elements of a parameter whose gradient is compared


def train(
    job: Job, variant: str, texts: documents.Documents, moved: int = 0
) -> tuple[Measurement, dict[str, torch.Tensor]]:
    """Train, and return the measurement and a sample of each parameter's gradients.

    Args:
        job: What to train.
        variant: By name.
        texts: The data.
        moved: Above 0, the seed by which the weights first move by a rounding.
    """
    device = "cuda" if this_machine().device == "cuda" else "cpu"
    kind, settings = parse(variant)
    torch.manual_seed(job.seed)
    model = kind.build(job, device, settings)
    fill(model, job.seed)
    if moved:
        move_by_a_rounding(model, moved)
    model.train()
    steps = [
        {name: column.to(device) for name, column in batch.tensors.items()} for batch in documents.batches(texts, job)
    ]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=job.learning_rate, fused=True)
    memory_before = _forget_peak(device)
    losses, seconds, cpu_seconds = (_on_gpu if device == "cuda" else _on_cpu)(model, optimizer, steps, job.warmup)
    measurement = Measurement(
        losses=losses,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        peak_memory_bytes=_peak(device),
        memory_before_bytes=memory_before,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in trained.values()),
        versions=_versions((*PACKAGES, *kind.packages)),
        report=_report(model) if variant.split(":")[0] == OURS else None,
    )
    return measurement, _gradients(trained, optimizer)


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _on_gpu(
    model: Any, optimizer: torch.optim.Optimizer, steps: list[dict[str, torch.Tensor]], warmup: int
) -> tuple[list[float], list[float], float]:
    """Nothing in the loop waits for the GPU: what the host needs for it is part of the time, as in real training."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]  # type: ignore[no-untyped-call]
    losses, cpu = [], 0.0
    marks[0].record()
    for number, batch in enumerate(steps):
        if number == warmup:
            torch.cuda.synchronize()
            marks[number].record()
            cpu = time.process_time()
        losses.append(_step(model, optimizer, batch))
        marks[number + 1].record()
    cpu = time.process_time() - cpu
    torch.cuda.synchronize()
    timed = zip(marks[warmup:], marks[warmup + 1 :], strict=False)
    return torch.stack(losses).tolist(), [start.elapsed_time(end) / 1000 for start, end in timed], cpu


def _on_cpu(
    model: Any, optimizer: torch.optim.Optimizer, steps: list[dict[str, torch.Tensor]], warmup: int
) -> tuple[list[float], list[float], float]:
    losses, seconds, cpu = [], [], 0.0
    for number, batch in enumerate(steps):
        if number == warmup:
            cpu = time.process_time()
        start = time.perf_counter()
        losses.append(_step(model, optimizer, batch))
        seconds.append(time.perf_counter() - start)
    return torch.stack(losses).tolist(), seconds[warmup:], time.process_time() - cpu


def _gradients(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's running means of the gradients, a sample of each."""
    found = {}
    for name, parameter in parameters.items():
        mean = optimizer.state[parameter]["exp_avg"].flatten()
        found[name] = mean[:: max(1, mean.numel() // SAMPLE)].to("cpu", torch.float32, copy=True)
    return found


def _forget_peak(device: str) -> int:
    """Lower the recorded peak to what is in use, and return that."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif LINUX_STATUS.exists():
        LINUX_STATUS.with_name("clear_refs").write_text("5")
    return _peak(device)


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if LINUX_STATUS.exists():
        lines = LINUX_STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name.replace("_", "-")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name.replace("_", "-")] = "not a distribution here"
    return found


def _report(model: Any) -> dict[str, Any]:
    import automodel_accel

    said = automodel_accel.report(model).to_dict()
    fusions = [claim["fusion"] for claim in said["applied"]]
    return {
        "places": {fusion: fusions.count(fusion) for fusion in dict.fromkeys(fusions)},
        "refusals": [f"{no['fusion']}: {no['what']}: {no['reason']}" for no in said["refusals"]],
        "materialised_logits": said["materialised_logits"],
    }


def main(request: dict[str, Any]) -> None:
    """Run the jobs of a request and write what they measured."""
    kind, _ = parse(request["variant"])
    for package in kind.packages:  # before transformers, which some of them change
        importlib.import_module(package)
    texts = documents.read(Path(request["documents"]))
    measured = []
    for number, fields in enumerate(request["jobs"]):
        job = Job(**fields)
        measurement, gradients = train(job, request["variant"], texts)
        measured.append(measurement.to_dict())
        moved = []
        for seed in request["moved"]:
            gc.collect()  # modules refer to each other: their memory would stay
            again, its_gradients = train(job, request["variant"], texts, seed)
            moved.append({"losses": again.losses, "gradients": its_gradients})
        trained = {"losses": measurement.losses, "gradients": gradients, "moved": moved}
        torch.save(trained, Path(request["folder"]) / f"trained{number}.pt")
    (Path(request["folder"]) / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
