"""The one rule by which "computes the same" is judged, by the proof at apply time and by the tests alike.

Against a float64 truth, the error of ours may be at most 1.25 times the error of torch in the same dtype, plus one unit in the
last place: in the largest element, and in the root mean square. A rule relative to what torch itself achieves needs no
tolerance per dtype or shape, and cannot be widened until a test passes.
"""

from dataclasses import dataclass

import torch

ALLOWED_RATIO = 1.25


@dataclass(frozen=True, slots=True)
class Verdict:
    """Errors of ours and of torch's, each as (largest, root mean square), and the unit in the last place at those scales."""

    ours: tuple[float, float]
    theirs: tuple[float, float]
    ulp: tuple[float, float]

    @property
    def excess(self) -> float:
        """Error of ours over what the rule allows; at most 1 passes. NaN never passes."""
        shares = [
            ours / allowed if (allowed := ALLOWED_RATIO * theirs + ulp) > 0 else (0.0 if ours == 0 else float("inf"))
            for ours, theirs, ulp in zip(self.ours, self.theirs, self.ulp, strict=True)
        ]
        return float("nan") if any(share != share for share in shares) else max(shares)

    @property
    def passed(self) -> bool:
        """Whether ours is within the rule."""
        return self.excess <= 1.0

    def __str__(self) -> str:
        return f"error {self.ours[0]:.3g} where torch has {self.theirs[0]:.3g}: {self.excess:.3g} of what is allowed"


def judge(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> Verdict:
    """Judge `ours` against `theirs` (torch, same dtype) by their distance to `truth` (float64).

    Raises:
        ValueError: shapes or dtypes of ours and theirs differ.
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise ValueError(f"ours is {tuple(ours.shape)} {ours.dtype}, torch gives {tuple(theirs.shape)} {theirs.dtype}.")
    truth = truth.detach().double()
    if truth.numel() == 0:
        return Verdict((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    eps = torch.finfo(ours.dtype).eps
    largest, rms = _size(truth)
    return Verdict(
        _size(ours.detach().double() - truth), _size(theirs.detach().double() - truth), (eps * largest, eps * rms)
    )


def _size(x: torch.Tensor) -> tuple[float, float]:
    return x.abs().max().item(), x.square().mean().sqrt().item()
