"""Whether a layer computes a part of the tokens as it computes them among all, but for its units, which are given all.

The model runs once on a few tokens. Each layer then computes its first half of them alone, and the other half, while its units
answer with their part of what they have answered to all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from automodel_accel.parallel.tensor_proof import TOKENS, Call, calls_of, first_of, unnoticed
from automodel_accel.patches.probe import PROBE_ERRORS

HIDDEN = "hidden_states"
ULPS = 16  # of the largest element: sums over other numbers of rows are rounded otherwise
Answers = Mapping[nn.Module, tuple[torch.Tensor, Any]]  # what a unit was given, and what it gave


def mixing_layer(base: Any, layers: Sequence[nn.Module], units: Sequence[nn.Module]) -> nn.Module | None:
    """The first layer in which, or after which, a token sees others outside of units, or which a run of the model did not call.

    Args:
        base: The model, on a device, with all its weights.
        layers: To be tried.
        units: Modules that will be given all tokens.
    """
    with unnoticed(base):
        calls = calls_of(base, layers)
        given = [first_input(*calls[one]) if one in calls else None for one in layers]
        tried = zip(layers, [*given[1:], None], strict=True)
        return next((one for one, then in tried if one not in calls or _mixes(one, calls[one], then, units)), None)


def token_dim(hidden: torch.Tensor) -> int:
    """Of [B, S, H], or [tokens, H]."""
    return 1 if hidden.dim() == 3 else 0


def first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The hidden states that a layer or a unit is given."""
    return args[0] if args else kwargs[HIDDEN]


def _mixes(layer: nn.Module, call: Call, given_to_next: torch.Tensor | None, units: Sequence[nn.Module]) -> bool:
    args, kwargs = call
    inside = [module for module in layer.modules() if module in set(units)]
    try:
        whole, answers = _observed(layer, call, inside)
        if given_to_next is not None and not _alike(whole, given_to_next):
            return True
        for half in (slice(0, TOKENS // 2), slice(TOKENS // 2, TOKENS)):
            hidden = _part(first_input(args, kwargs), half)
            with _answering(answers, half):
                part = layer(hidden, *args[1:], **kwargs) if args else layer(**{**kwargs, HIDDEN: hidden})
            if not _alike(first_of(part), _part(whole, half)):
                return True
    except PROBE_ERRORS:  # sizes that do not fit: it was given more than the tokens' hidden states
        return True
    return False


def _observed(layer: nn.Module, call: Call, inside: Sequence[nn.Module]) -> tuple[torch.Tensor, Answers]:
    answers: dict[nn.Module, tuple[torch.Tensor, Any]] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        answers[module] = (first_input(args, kwargs).clone(), output)

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in inside]
    try:
        return first_of(layer(*call[0], **call[1])), answers
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _answering(answers: Answers, half: slice) -> Iterator[None]:
    """Inside, units give that part of what they gave."""

    def answer(given: torch.Tensor, output: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not _alike(first_input(args, kwargs), _part(given, half)):
                raise ValueError("a unit is given something else than these tokens of its input")
            return (_part(output[0], half), *output[1:]) if isinstance(output, tuple) else _part(output, half)

        return forward

    try:
        for unit, (given, output) in answers.items():
            unit.forward = answer(given, output)
        yield
    finally:
        for unit in answers:
            vars(unit).pop("forward", None)


def _part(tensor: torch.Tensor, half: slice) -> torch.Tensor:
    return tensor[:, half] if token_dim(tensor) else tensor[half]


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    allowed = ULPS * torch.finfo(one.dtype).eps * other.abs().max()
    return bool((one - other).abs().max() <= allowed)
