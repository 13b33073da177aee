"""Output head and loss, forward and backward: the logits built as a whole, against `linear_cross_entropy`."""

import torch
import torch.nn.functional as F

from automodel_accel.kernels.linear_cross_entropy import linear_cross_entropy
from bench.case import Case, Inputs, Sizes

IGNORE_INDEX = -100


def _inputs(sizes: Sizes, dtype: torch.dtype, device: str) -> Inputs:
    tokens, hidden, vocab = (int(sizes[name]) for name in ("tokens", "hidden", "vocab"))
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator, dtype=dtype, device=device)
    weight = torch.randn(vocab, hidden, generator=generator, dtype=dtype, device=device).mul_(hidden**-0.5)
    target = torch.randint(vocab, (tokens,), generator=generator, device=device)
    target[: round(tokens * sizes["ignored"])] = IGNORE_INDEX
    return {"hidden": x.requires_grad_(), "weight": weight.requires_grad_(), "target": target}


def _vanilla(inputs: Inputs) -> None:
    # no name holds the logits: their memory is free once the loss is known, though a model would return them
    loss = F.cross_entropy(
        F.linear(inputs["hidden"], inputs["weight"]).float(), inputs["target"], ignore_index=IGNORE_INDEX
    )
    loss.backward()  # type: ignore[no-untyped-call]


def _ours(inputs: Inputs) -> None:
    loss = linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["target"], ignore_index=IGNORE_INDEX)
    loss.backward()  # type: ignore[no-untyped-call]


def _flops(sizes: Sizes) -> float:
    """Three GEMMs on the tokens that count."""
    return 6.0 * sizes["tokens"] * (1 - sizes["ignored"]) * sizes["hidden"] * sizes["vocab"]


def _bytes_floor(sizes: Sizes, itemsize: int) -> float:
    """The weight read for the logits and for the gradient of hidden, its gradient written; likewise hidden."""
    return 3.0 * (sizes["vocab"] + sizes["tokens"]) * sizes["hidden"] * itemsize


CASE = Case(
    name="linear_cross_entropy",
    about="F.cross_entropy(F.linear(...)) against the loss without logits, forward and backward",
    tests=(
        "tests/ops/test_linear_cross_entropy.py",
        "-k",
        "test_every_option or test_rows or test_details or test_memory",
    ),
    sizes={"tokens": 4096, "hidden": 512, "vocab": 128256, "ignored": 0.0},
    quick={"tokens": 256, "hidden": 64, "vocab": 8192, "ignored": 0.0},
    inputs=_inputs,
    variants={"vanilla": _vanilla, "ours": _ours},
    flops=_flops,
    bytes_floor=_bytes_floor,
)
