"""A loop with accelerate, for the config files beside this script: the losses are those of one process.

accelerate launch --config_file fsdp2.yaml train.py
accelerate launch --config_file fsdp2_lora.yaml train.py --lora
accelerate launch --cpu --num_processes 2 train.py
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import LlamaConfig, LlamaForCausalLM

import automodel_accel as accel

STEPS, ROWS, TOKENS = 4, 8, 48
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def build_model() -> LlamaForCausalLM:
    """A tiny Llama; any Hugging Face model: AutoModelForCausalLM.from_pretrained("...")."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, num_key_value_heads=2, **sizes))


def main() -> None:
    """Train for a few steps, and print the loss of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lora", action="store_true")
    chosen = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator()
    # before prepare() wraps the model; adapters are the same in all processes, as the seed is
    model = accel.apply(build_model(), lora=LORA if chosen.lora else None, recompute="selective")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    for step in range(1, STEPS + 1):
        rows = torch.arange(step, step + ROWS)[:, None] + torch.arange(TOKENS)
        own = rows[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
        labels = torch.tensor(ROWS * (TOKENS - 1), device=accelerator.device)  # of all processes
        loss = model(input_ids=own, labels=own, num_items_in_batch=labels).loss  # this process's share of the mean
        accelerator.backward(loss * accelerator.num_processes)  # as gradients are averaged
        optimizer.step()
        optimizer.zero_grad()
        total = accelerator.reduce(loss.detach(), reduction="sum")
        accelerator.print(f"step {step}: loss {total.item():.6f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
