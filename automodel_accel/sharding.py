"""gather_fp8: what `apply` and FSDP2 have to tell one another."""

from typing import Any

from torch import nn

from automodel_accel.api import find_report
from automodel_accel.kernels.contract import AUTO, Refusal, implementation_module


def gather_fp8(model: nn.Module) -> list[Refusal]:
    """Have FSDP2 gather the weights of FP8 linears in 8 bits: half of the bytes of bfloat16, and no cast where they are whole.

    After `apply(model, fp8=...)` and after `fully_shard`, before the first forward; in every process alike. Losses, gradients,
    optimizer and checkpoints are as without (kernels/fp8_linear/sharded.py).

    Args:
        model: As `fully_shard` has left it.

    Returns:
        The weights that are gathered as they are, and why: such as rows that do not divide by the number of processes.

    Raises:
        ValueError: the model is not applied, has no FP8 linears, or none of their weights is a parameter of FSDP2.
    """
    from automodel_accel.kernels.fp8_linear import KERNEL, sharded  # registers its operation only here
    from automodel_accel.patches.fp8 import RECIPES, weights_of

    done = find_report(model)
    claims = [claim for claim in done.applied if claim.fusion == "fp8"] if done is not None else []
    if not claims:
        raise ValueError(
            "this model has no FP8 linears; call automodel_accel.apply(model, fp8=...) before fully_shard."
        )
    refused: list[Refusal] = []
    for recipe in dict.fromkeys(claim.form.recipe for claim in claims):  # type: ignore[attr-defined]
        groups: list[list[Any]] = []
        for claim in claims:
            if claim.form.recipe == recipe:  # type: ignore[attr-defined]
                for names, weights in weights_of(claim, model):
                    reasons = [reason for weight in weights if (reason := sharded.objection(weight)) is not None]
                    refused += [Refusal(", ".join(names), reason, "gathered as they are") for reason in reasons[:1]]
                    groups += [] if reasons else [weights]
        if groups:
            weight = groups[0][0]
            casts = implementation_module(KERNEL, weight.device.type, weight.dtype, weight.shape[1], AUTO)
            sharded.gather_in_8_bits(groups, RECIPES[recipe].rowwise, casts)
    if len(refused) == sum(len(list(weights_of(claim, model))) for claim in claims):
        raise ValueError(
            f"no weight can be gathered in 8 bits: {'; '.join(dict.fromkeys(no.reason for no in refused))}."
        )
    return refused
