"""The smallest example: one line accelerates a model, one call shows what it did, one call undoes it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import automodel_accel as accel

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)  # any Hugging Face model: AutoModelForCausalLM.from_pretrained("...")

accel.apply(model)  # the one line

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tokens = torch.randint(config.vocab_size, (2, 32))
loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
optimizer.step()

print(f"loss of the first step: {loss.item():.4f}\n")
print(accel.report(model))
accel.revert(model)  # every module is what it was
