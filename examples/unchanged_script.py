"""Train a small language model on the characters of a text file: an ordinary script with transformers' Trainer.

python unchanged_script.py --text my.txt --max_steps 20 --learning_rate 3e-3
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed


@dataclass
class ModelArguments:
    """What is trained, and on what."""

    text: str = field(default=__file__, metadata={"help": "A text file; this script by default."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the model."})
    num_layers: int = field(default=2, metadata={"help": "Depth of the model."})
    block_size: int = field(default=64, metadata={"help": "Characters in one example."})


def blocks(text: str, size: int) -> list[dict[str, torch.Tensor]]:
    """Examples of `size` bytes each; a byte is a token."""
    tokens = torch.tensor(list(text.encode("utf-8")))
    return [{"input_ids": block, "labels": block} for block in tokens.split(size) if len(block) == size]


def build_model(arguments: ModelArguments) -> LlamaForCausalLM:
    """A Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=arguments.hidden_size,
            intermediate_size=2 * arguments.hidden_size,
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=arguments.block_size,
        )
    )


def main() -> None:
    """Train, then evaluate on the last tenth of the text."""
    parser = HfArgumentParser((ModelArguments, TrainingArguments))
    parser.set_defaults(
        output_dir="out/unchanged_script",
        max_steps=20,
        learning_rate=3e-3,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        gradient_accumulation_steps=2,
    )
    model_arguments, training_arguments = parser.parse_args_into_dataclasses()
    set_seed(training_arguments.seed)
    examples = blocks(Path(model_arguments.text).read_text(encoding="utf-8"), model_arguments.block_size)
    held_out = max(1, len(examples) // 10)
    trainer = Trainer(
        model=build_model(model_arguments),
        args=training_arguments,
        train_dataset=examples[:-held_out],
        eval_dataset=examples[-held_out:],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss: {before:.4f} before, {trainer.evaluate()['eval_loss']:.4f} after")


if __name__ == "__main__":
    main()
