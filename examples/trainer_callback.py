"""transformers' Trainer with one more argument: the model is accelerated, and the Trainer's log says how fast it trains.

W&B and TensorBoard show the same figures: TrainingArguments(report_to="tensorboard").
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from automodel_accel import AccelCallback, report

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
model = LlamaForCausalLM(config)  # any Hugging Face model: AutoModelForCausalLM.from_pretrained("...")
tokens = [torch.arange(start, start + 64) % config.vocab_size for start in range(0, 6400, 100)]  # it learns to count

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=30,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[AccelCallback()],  # the one line
    )
    trainer.train()

print()
for log in trainer.state.log_history[:-1]:
    print(f"step {log['step']}: loss {log['loss']:.3f}")
    print(f"    {log['tokens_per_second_per_device']:.0f} tokens/s, at most {log['peak_memory_gb']:.2f} GB")
    parts = ("data", "forward_backward", "optimizer")
    print("    a step: " + ", ".join(f"{part} {1000 * log[f'seconds_{part}']:.1f} ms" for part in parts))
    print(f"    {log['materialised_logits']} steps built logits\n")
print(report(model))
