"""A vision-language model trained from scratch on questions about pictures, in minutes on a CPU.

    pip install easy-vqa --no-deps
    python examples/vlm_vqa.py

The model is a tiny LLaVA: a CLIP vision tower, a projector and a Llama, of random weights. The data are 38,575 questions on 4,000
pictures of shapes (easy-vqa, MIT licence); the test asks other questions on other pictures. Whoever looks at the question alone
gets two thirds of them right.
"""

import argparse
import importlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import automodel_accel as accel
from automodel_accel.data.vision import VisionData
from automodel_accel.data.vision_collate import VisionCollate
from automodel_accel.data.vision_settings import Llava
from automodel_accel.freezing import summary

SEED = 0
SIDE, PATCH, WIDTH = 64, 8, 96  # pixels of a picture's side and of a patch's; features of a token
PEAK_LEARNING_RATE = 2e-3
# an image, the words of the question, and the answer up to the token that ends it
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }} "
    "{% endfor %}{{ '<eos>' if message.role == 'assistant' else '' }}{% endfor %}"
)


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
    start, processor_start = time.perf_counter(), time.process_time()
    losses = train(job.model, job.training, options.steps)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    share = accuracy(job.model, job.testing)
    figures = {
        **{"accuracy": share, "first_loss": losses[0], "last_loss": losses[-1]},
        **{"seconds": seconds, "processor_seconds": processor_seconds},
    }
    print(f"{len(losses)} steps in {seconds:.0f} s, {processor_seconds:.0f} s of a processor (images beside them)")
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, test accuracy {share:.3f}")
    (options.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
    files = [write_rows(options.output, part) for part in ("train", "test")]
    processor = build_processor(files[0])
    collate = VisionCollate(processor)
    training, testing = (VisionData(Llava(path=str(file))) for file in files)
    asked = torch.randperm(len(testing), generator=torch.Generator().manual_seed(SEED))[: options.test_questions]
    picked = torch.utils.data.RandomSampler(training, num_samples=options.steps * options.batch_size)
    shared: dict[str, Any] = {"batch_size": options.batch_size, "collate_fn": collate, "num_workers": options.workers}
    return Job(
        build_model(processor),
        DataLoader(training, sampler=picked, **shared),
        DataLoader(Subset(testing, asked.tolist()), **shared),
    )


def write_rows(folder: Path, part: str) -> Path:
    """Write the questions of a part as LLaVA's JSON. Raises ValueError where easy-vqa is not installed."""
    try:
        package = importlib.import_module("easy_vqa")
    except ModuleNotFoundError as error:
        raise ValueError("the data come in the package easy-vqa; `pip install easy-vqa --no-deps`.") from error
    questions, answers, numbers = getattr(package, f"get_{part}_questions")()
    paths = getattr(package, f"get_{part}_image_paths")()
    rows = [
        {
            "image": str(Path(paths[number]).resolve()),
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for question, answer, number in zip(questions, answers, numbers, strict=True)
    ]
    file = folder / f"{part}.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def build_processor(file: Path) -> Any:
    """A word is a token: every word of the training rows."""
    said = [turn["value"] for row in json.loads(file.read_text(encoding="utf-8")) for turn in row["conversations"]]
    words = sorted({word for text in said for word in text.removeprefix("<image>\n").replace("?", " ?").split()})
    known = {word: number for number, word in enumerate(["<pad>", "<image>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"},
        extra_special_tokens={"image_token": "<image>"},
    )
    images = transformers.CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    return transformers.LlavaProcessor(
        *(images, fast),
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
    )


def build_model(processor: Any) -> Any:
    """0.4 million parameters of random values."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH},
    )
    text = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
        vocab_size=len(processor.tokenizer),
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def train(model: Any, batches: DataLoader[Any], steps: int) -> list[float]:
    """A plain loop; returns the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    losses = []
    model.train()
    for batch in tqdm(batches, desc="training", unit="step"):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


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
