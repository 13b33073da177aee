"""TRL's SFTTrainer with one line of ours, on a CPU, offline: a tiny model from a config, and a tokenizer made on the spot.

TRL's loss also gives the token accuracy and the entropy that it logs, and builds no logits: it stays TRL's. Everything before
it is ours, and transformers' own log has the speed beside TRL's metrics.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import automodel_accel as accel

FRUIT = ("apple", "pear", "plum", "fig", "lime", "kiwi", "date", "peach")
STEPS = 20

rows = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"What colour is a {fruit}?"}],
            "completion": [{"role": "assistant", "content": f"A {fruit} is green, I think."}],
        }
        for fruit in FRUIT * 10
    ]
)

words = ByteLevelBPETokenizer()
words.train_from_iterator(
    [turn["content"] for row in rows for turn in row["prompt"] + row["completion"]],
    vocab_size=400,
    special_tokens=["<|user|>", "<|assistant|>", "<|end|>"],
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
tokenizer.chat_template = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
)

with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=folder,
            max_steps=STEPS,
            learning_rate=3e-3,
            per_device_train_batch_size=8,
            logging_steps=STEPS // 2,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[accel.AccelCallback()],  # the one line
    )
    trainer.train()

print(accel.report(trainer.model))
for row in trainer.state.log_history:
    if "tokens_per_second_per_device" in row:
        print(
            f"step {row['step']}: loss {row['loss']:.3f}, token accuracy {row['mean_token_accuracy']:.2f}, "
            f"{row['tokens_per_second_per_device']:.0f} tokens/s, {row['materialised_logits']} steps with logits"
        )
