"""A run that survives anything: killed at any moment, it goes on from its last whole checkpoint when it is started again.

    python examples/resume.py --output run
    torchrun --nproc-per-node 2 examples/resume.py --output run   # goes on where one process stopped, under DDP

Ctrl-C and SIGTERM (what a scheduler sends before it takes the machine) save and end the run with code 0. At the end the model is exported
for plain transformers.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import automodel_accel as accel
from automodel_accel.checkpoint import Checkpoints, export

ROWS, TOKENS, VOCABULARY = 8, 24, 64  # rows of all processes together in one step


class Rows:
    """Runs of numbers; the position counts the rows that all processes have seen together, so that their number may change."""

    def __init__(self) -> None:
        self.position = 0

    def next(self) -> torch.Tensor:
        """The next rows of this process."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        first = torch.arange(self.position, self.position + ROWS)[rank::size]
        self.position += ROWS
        return (first[:, None] + torch.arange(TOKENS)) % VOCABULARY

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there."""
        self.position = state["position"]


def build_model() -> LlamaForCausalLM:
    """A tiny Llama; any Hugging Face model: AutoModelForCausalLM.from_pretrained("...")."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=2, **sizes))
    accel.apply(model)
    return model


def train(output: Path, steps: int) -> None:
    """Go on from the last checkpoint, if there is one, to the given step."""
    model = build_model()
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = Rows()
    state = {"model": wrapped, "optimizer": optimizer, "scheduler": scheduler, "data": rows}
    with Checkpoints(output / "checkpoints", keep_best=1, signals=("SIGTERM", "SIGINT")) as checkpoints:
        restored = checkpoints.load(**state)
        for step in range(restored.step if restored else 0, steps):
            tokens = rows.next()
            loss = wrapped(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            stop = checkpoints.stop_requested()
            if stop or (step + 1) % 10 == 0:
                print(f"step {step + 1} loss {loss.item():.4f}", flush=True)
                checkpoints.save(step + 1, metrics={"loss": loss.item()}, **state)
            if stop:
                print("stopped; start it again to go on", flush=True)
                return
    if not (output / "model").exists():
        export(wrapped, output / "model")
    print(f"the model is in {output / 'model'}")


def main() -> None:
    """Read the arguments, and train under torchrun or alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints and model")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps in all")
    options = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    train(options.output, options.steps)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
