"""Attention of rows that are cut by torch's own context parallelism: keys and values go round the ranks, and are never whole.

torch's prototype (torch.distributed.tensor.experimental.context_parallel) exchanges its attention while it is entered; a model
that was cut by context.py then calls it with its own tokens, in the order that torch balances by too. It knows plain causal rows
only, by the flash and cuDNN kernels of NVIDIA's GPUs; for all others keys and values are gathered. Not measured here.

    with ring_attention(ranks, tokens):
        loss = model(**batch).loss
        loss.backward()
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import experimental

from automodel_accel.kernels.facts import Facts, this_machine
from automodel_accel.parallel.context_rows import Rows
from automodel_accel.parallel.mesh import Ranks


def ring_objection(facts: Facts) -> str | None:
    """Why torch's ring cannot run on such a machine, or None."""
    if facts.device != "cuda":
        return f"torch's ring attention needs NVIDIA GPUs, and this machine trains on {facts.device!r}"
    if not hasattr(experimental, "context_parallel"):
        return f"torch {facts.torch} has no torch.distributed.tensor.experimental.context_parallel"
    return None


@contextmanager
def ring_attention(ranks: Ranks, tokens: int, facts: Facts | None = None) -> Iterator[None]:
    """Inside, forward and backward of a model that was cut pass keys and values round, in place of gathering them.

    Args:
        ranks: As given to `context.cut`.
        tokens: The length of the rows.
        facts: The machine to decide for; this one by default.

    Raises:
        ValueError: this machine or torch cannot; or, by the model, rows that are not plain causal ones.
    """
    if (reason := ring_objection(facts or this_machine())) is not None:
        raise ValueError(f"ring_attention: {reason}; train without it, which gathers keys and values instead.")
    if ranks.device_mesh is None or ranks.mesh.context == 1:
        yield
        return
    # torch balances by the length of what it is given to cut
    filled = Rows(None, ranks.mesh.context, ranks.rank_of("context"), tokens).length
    stand_in = torch.empty(filled, device=ranks.device_mesh.device_type)
    with experimental.context_parallel(
        ranks.device_mesh["context"], buffers=[stand_in], buffer_seq_dims=[0], no_restore_buffers={stand_in}
    ):
        yield
