"""A plain loop over a small language model, on one process or on several with DDP; prints its losses."""

import argparse
import json
import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM


def train(processes: int, rank: int, lr: float) -> dict[str, list[float]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=2, **sizes))
    rows = torch.randint(97, (6, 4, 16)).tensor_split(processes, dim=1)[rank]
    if processes > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for row in rows:
        loss = model(input_ids=row, labels=row).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / processes
        if processes > 1:
            distributed.all_reduce(mean)
        losses.append(mean.item())
    return {"losses": losses, "weights": [part.norm().item() for part in model.parameters()]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.2)
    arguments = parser.parse_args()
    rank = 0
    if arguments.processes > 1:
        distributed.init_process_group("gloo")
        rank = distributed.get_rank()
    found = train(arguments.processes, rank, arguments.lr)
    if rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    if arguments.processes > 1:
        # gloo's threads let go of their tensors here: they need the GIL for it, which the end of the group would hold
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
