"""What is checked in the first forward that is cut: that only attention mixes tokens, that the loss takes labels which were shifted
before, and that all ranks have the same rows.

Cutting a row is right for a layer that treats each token alone, and for attention, which gathers what it needs. A convolution
along tokens, a recurrence, a state space, linear attention, or an attention that asks nobody would see a part of the row only.
So one token is made NaN, each attention lets every token see itself alone, and the model runs: were there another way from that
token to another, the NaN would take it, whatever the weights are. In the same run the model is given labels for each token, and
others to shift, which it is to leave alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from automodel_accel.parallel.context_attention import Running
from automodel_accel.parallel.context_rows import Rows

TOKENS, POISONED, ITEMS = 12, 5, 7.0
IGNORED = -100
SAME = 1e-4  # relative; the same sum in the same dtype, while a wrong label or number changes a loss by far more


def check_tokens_apart(owner: nn.Module, forward: Callable[..., Any], running: Running, device: torch.device) -> None:
    """Run `forward` on one small row; waits for the device, once.

    Raises:
        ValueError: tokens reach one another otherwise than by the attention that is cut, or the loss is another one than the sum
            over the shifted labels, divided by their number.
    """
    embedding: nn.Module = owner.get_input_embeddings()  # type: ignore[operator]

    def poison(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, POISONED] = torch.nan
        return output

    hook = embedding.register_forward_hook(poison)
    training = [module for module in owner.modules() if module.training]
    running.alone = True
    for module in training:  # products of 8-bit values share a scale in training, and remember it
        module.training = False
    devices = [] if device.type == "cpu" else [torch.accelerator.current_device_index()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            position_ids = torch.arange(TOKENS, device=device)[None]
            input_ids, shifted = torch.ones_like(position_ids), position_ids.clone()
            shifted[:, POISONED] = IGNORED
            labels = {"labels": torch.zeros_like(input_ids), "shift_labels": shifted, "num_items_in_batch": ITEMS}
            done = forward(owner, input_ids=input_ids, position_ids=position_ids, use_cache=False, **labels)
            logits, loss = done.logits.float(), done.loss.float()
            expected = F.cross_entropy(logits[0], shifted[0], ignore_index=IGNORED, reduction="sum") / ITEMS
    finally:
        running.alone = False
        hook.remove()
        for module in training:
            module.training = True
    reached = logits.isnan().any(-1)[0].tolist()
    if reached != [token == POISONED for token in range(TOKENS)]:
        raise ValueError(
            f"context: in this {type(owner).__name__} something besides attention mixes tokens (a convolution, a recurrence, a "
            f"state space, an attention that asks no interface): token {POISONED} of {TOKENS} alone reaches "
            f"{[token for token, yes in enumerate(reached) if yes]}; train it with Mesh(context=1)."
        )
    if not torch.isclose(loss, expected, rtol=SAME):
        raise ValueError(
            f"context: the loss of this {type(owner).__name__} is {loss.item():.6g} where the sum over shifted labels by their "
            f"number is {expected.item():.6g}: it shifts labels itself, within a part of the row, or adds another loss; train it "
            "with Mesh(context=1)."
        )


def check_rows(rows_of_rank: torch.Tensor, rows: Rows) -> None:
    """Compare what the ranks were given; waits for the device, once.

    Raises:
        ValueError: not the same rows.
    """
    places = torch.arange(1, rows_of_rank[0].numel() + 1, device=rows_of_rank.device, dtype=torch.float64)
    sums = rows_of_rank.detach().flatten(1).double() @ places
    mark = torch.stack([sums.sum(), sums.square().sum(), places[-1], torch.full_like(places[0], len(rows_of_rank))])
    marks = [torch.empty_like(mark) for _ in range(rows.size)]
    dist.all_gather(marks, mark, group=rows.group)
    if any(not torch.equal(other, mark) for other in marks):
        raise ValueError(
            "context: the ranks of the context axis were given different rows; a sampler is to cut the data in "
            "Ranks.data_size parts, of which this process takes Ranks.data_rank."
        )
