"""One model on several processes, laid out by a mesh: the losses are those of one process.

python multi_gpu.py
torchrun --nproc-per-node 2 multi_gpu.py
torchrun --nproc-per-node 8 multi_gpu.py --shard 4 --tensor 2
"""

import argparse
from collections.abc import Iterator

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import automodel_accel as accel
from automodel_accel.parallel import Mesh, clip_grad_norm_

IGNORED = -100  # label of a token that gives no loss
STEPS, ROWS, TOKENS = 6, 8, 48


def build_model() -> LlamaForCausalLM:
    """A tiny Llama; any Hugging Face model: AutoModelForCausalLM.from_pretrained("...")."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, num_key_value_heads=2, **sizes))


def batches() -> Iterator[torch.Tensor]:
    """Token numbers of all data ranks, [rows, tokens]: runs of numbers that start anywhere."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        start = torch.randint(1, 200, (ROWS, 1), generator=generator)
        yield start + torch.arange(TOKENS)


def main() -> None:
    """Train for a few steps, and print the loss of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    for axis, size in (("replicate", 1), ("shard", -1), ("tensor", 1)):
        parser.add_argument(f"--{axis}", type=int, default=size)
    chosen = parser.parse_args()
    ranks = Mesh(replicate=chosen.replicate, shard=chosen.shard, tensor=chosen.tensor).ranks()
    model = accel.apply(build_model(), mesh=ranks)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, rows in enumerate(batches(), 1):
        input_ids = rows[ranks.data_rank :: ranks.data_size].to(device)  # ranks that cut products see the same rows
        labels = input_ids.masked_fill(torch.arange(TOKENS, device=device) < 4, IGNORED)
        counted = (labels[:, 1:] != IGNORED).sum()
        if ranks.tokens_group is not None:
            dist.all_reduce(counted, group=ranks.tokens_group)
        loss = model(
            input_ids=input_ids, labels=labels, num_items_in_batch=counted
        ).loss  # this rank's share of the mean
        (loss * ranks.data_size).backward()  # as gradients are averaged over data ranks
        norm = clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if ranks.tokens_group is not None:
            dist.all_reduce(total, group=ranks.tokens_group)
        if ranks.device_mesh is None or dist.get_rank() == 0:
            print(f"step {step}: loss {total.item():.6f}, gradient norm {norm.item():.6f}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
