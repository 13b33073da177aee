"""A vision-language model trained from scratch on questions about pictures, in minutes on a CPU.

    pip install easy-vqa --no-deps
    python examples/vlm_vqa.py
    python examples/vlm_vqa.py --model runs/vlm_full/model     (tests what the recipe vlm_full.yaml trained)

The model is a tiny LLaVA: a CLIP vision tower, a projector and a Llama, of random weights. The data are 38,575 questions on 4,000
pictures of shapes (easy-vqa, MIT licence); the test asks other questions on other pictures. Whoever looks at the question alone
gets two thirds of them right.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import automodel_accel as accel
from automodel_accel.data.vision import VisionData
from automodel_accel.data.vision_collate import VisionCollate
from automodel_accel.data.vision_settings import Llava
from automodel_accel.demo import easy_vqa
from automodel_accel.demo.tiny_llava import build_model, build_processor
from automodel_accel.freezing import summary
from automodel_accel.train.schedules import Schedule

SEED = 0
PEAK_LEARNING_RATE = 2e-3


@dataclass(frozen=True, slots=True)
class Job:
    """What a run needs: batches to train on and to be asked."""

    model: Any
    training: DataLoader[Any]
    testing: DataLoader[Any]


def main() -> int:
    """Train, test, and print the accuracy."""
    options = arguments()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    try:
        job = prepare(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(job.model))
    accel.apply(job.model)
    figures = {} if options.model else train(job.model, job.training, options.steps)
    figures["accuracy"] = accuracy(job.model, job.testing)
    print(f"test accuracy {figures['accuracy']:.3f}")
    (options.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a trained model, which is tested and not trained")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--test-questions", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1, help="of the model; images are decoded by one more process")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/vlm_vqa"))
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> Job:
    """The model, its processor, and the data in LLaVA's format."""
    options.output.mkdir(parents=True, exist_ok=True)
    files = [easy_vqa.folder() / f"{part}.json" for part in easy_vqa.PARTS]
    processor = (
        transformers.AutoProcessor.from_pretrained(options.model) if options.model else build_processor(files[0])
    )
    collate = VisionCollate(processor)
    training, testing = (VisionData(Llava(path=str(file))) for file in files)
    asked = torch.randperm(len(testing), generator=torch.Generator().manual_seed(SEED))[: options.test_questions]
    picked = torch.utils.data.RandomSampler(training, num_samples=options.steps * options.batch_size)
    shared: dict[str, Any] = {"batch_size": options.batch_size, "collate_fn": collate, "num_workers": options.workers}
    return Job(
        transformers.AutoModelForImageTextToText.from_pretrained(options.model)
        if options.model
        else build_model(processor),
        DataLoader(training, sampler=picked, **shared),
        DataLoader(Subset(testing, asked.tolist()), **shared),
    )


def train(model: Any, batches: DataLoader[Any], steps: int) -> dict[str, float]:
    """A plain loop; returns and prints its figures."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    schedule = Schedule(warmup=0.1).build(optimizer, steps)
    losses = []
    start, processor_start = time.perf_counter(), time.process_time()
    model.train()
    for batch in tqdm(batches, desc="training", unit="step"):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    print(f"{steps} steps in {seconds:.0f} s, {processor_seconds:.0f} s of a processor (images beside them)")
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return {
        **{"first_loss": losses[0], "last_loss": losses[-1]},
        **{"seconds": seconds, "processor_seconds": processor_seconds},
    }


@torch.no_grad()
def accuracy(model: Any, batches: DataLoader[Any]) -> float:
    """The share of questions whose first answered word, the whole answer here, is the right one."""
    model.eval()
    right = asked = 0
    for batch in tqdm(batches, desc="testing", unit="batch"):
        labels = batch.pop("labels")
        first = (labels >= 0).int().argmax(1)
        rows = torch.arange(len(labels))
        said = model(**batch).logits[rows, first - 1].argmax(-1)
        right += int((said == labels[rows, first]).sum())
        asked += len(labels)
    return right / asked


if __name__ == "__main__":
    sys.exit(main())
