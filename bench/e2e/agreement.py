"""Whether two trainings are the same one, up to rounding.

The measure of rounding is vanilla itself: it trains twice more from weights of which one in twelve is moved by one unit in
the last place, which errs as much as one more rounding of all weights (rms ulp / sqrt(12)). The rule: at every step, a
variant's loss is at most `ALLOWED_RATIO` times as far from vanilla's as those trainings ever are, plus `ULPS` units in the
last place of the loss in float32, which a mean over tokens in another order may differ by.

A loss curve forgives a parameter that never moves, for many steps, and in bfloat16 a weight near 1 does not even move by a
right step. So the gradients are judged by the same rule, as AdamW's running mean of them at the end: in the parameter that is
farthest from vanilla's (as a share of its size), a variant is at most `ALLOWED_RATIO` times as far as vanilla from moved
weights in its farthest one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

ALLOWED_RATIO = 2.0
ULPS = 8
Gradients = Mapping[str, torch.Tensor]


def curves(losses: Sequence[float], vanilla: Sequence[float], moved: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Judge a loss curve against vanilla's, given those of vanilla from moved weights. NaN never agrees."""
    difference, step = _farthest(losses, vanilla)
    noise = max(_farthest(other, vanilla)[0] for other in moved)
    allowed = ALLOWED_RATIO * noise + ULPS * torch.finfo(torch.float32).eps * max(map(abs, vanilla))
    return {
        "loss_difference": difference,
        "loss_difference_step": step,
        "loss_noise": noise,
        "loss_allowed": allowed,
        "loss_agrees": difference <= allowed,
    }


def gradients(found: Gradients, vanilla: Gradients, moved: Sequence[Gradients]) -> dict[str, Any]:
    """Judge the gradients against vanilla's, given those of vanilla from moved weights. NaN never agrees.

    Returns:
        Distances to vanilla's as a share of their size: of all together, and of the parameter that is farthest. Where the
        parameters have other names (a variant with modules of its own) there is nothing to compare.
    """
    if found.keys() != vanilla.keys():
        return {"gradient_distance": None}
    worst, name = _farthest_parameter(found, vanilla)
    noise = max(_farthest_parameter(other, vanilla)[0] for other in moved)
    allowed = ALLOWED_RATIO * noise + ULPS * torch.finfo(torch.float32).eps
    return {
        "gradient_distance": _distance(_all(found), _all(vanilla)),
        "gradient_distance_worst": worst,
        "gradient_worst_parameter": name,
        "gradient_noise": noise,
        "gradient_allowed": allowed,
        "gradients_agree": worst <= allowed,
    }


def _farthest_parameter(found: Gradients, vanilla: Gradients) -> tuple[float, str]:
    distances = ((_distance(found[name], value), name) for name, value in vanilla.items())
    return max(distances, key=lambda one: (one[0] != one[0], one[0]))


def _farthest(losses: Sequence[float], others: Sequence[float]) -> tuple[float, int]:
    """The largest difference, and the step (counted from 1) at which it is; NaN is larger than any number."""
    differences = [abs(one - other) for one, other in zip(losses, others, strict=True)]
    step = max(range(len(differences)), key=lambda at: (differences[at] != differences[at], differences[at]))
    return differences[step], step + 1


def _all(found: Gradients) -> torch.Tensor:
    return torch.cat([found[name] for name in sorted(found)])


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    difference, size = (one.double() - other.double()).norm(), other.double().norm()
    return (difference / size).item() if size > 0 else float(difference > 0)
