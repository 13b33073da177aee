"""Whether a unit that is cut computes what it computes whole: all its parts in turn, in one process, and their sum.

The model runs once on a few tokens, which shows what its units are called with; then one unit of each kind computes in float64, whole
and in parts. Nothing is taken from names or plans, but it takes weights: a model on the meta device is believed its plan.
"""

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from automodel_accel.parallel.tensor_local import own_part
from automodel_accel.parallel.tensor_units import Unit
from automodel_accel.patches.contract import Counts
from automodel_accel.patches.probe import PROBE_ERRORS, structure_key
from automodel_accel.patches.retype import owner_of

TOKENS = 6
EXACT = 1e-9  # in float64, of the largest element
Call = tuple[tuple[Any, ...], dict[str, Any]]


def disprove(base: Any, units: Sequence[Unit], size: int) -> dict[str, str]:
    """Path of a unit -> why it cannot be cut as is said.

    Args:
        base: The model, on a device, with all its weights.
        units: To be tried; units of one structure are tried once.
        size: Ranks that it would be cut over.
    """
    kinds: dict[Hashable, list[Unit]] = {}
    for unit in units:
        kinds.setdefault((structure_key(unit.module), tuple(sorted(unit.linears.items()))), []).append(unit)
    with unnoticed(base):
        calls = calls_of(base, [alike[0].module for alike in kinds.values()])
        reasons = {key: _reason(alike[0], calls, size) for key, alike in kinds.items()}
    return {unit.path: reason for key, alike in kinds.items() if (reason := reasons[key]) for unit in alike}


def _reason(unit: Unit, calls: Mapping[nn.Module, Call], size: int) -> str | None:
    if unit.module not in calls:
        return "a run of the model on a few tokens did not call it, so that its parts could not be tried"
    args, kwargs = tree_map(_doubled, calls[unit.module])
    module: Any = copy.deepcopy(unit.module).double()
    if hasattr(module, "config"):
        module.config._experts_implementation = "eager"  # others have no products in float64
    whole = {name: parameter.detach() for name, parameter in module.named_parameters()}
    roles = dict(unit.module.named_parameters())
    try:
        expected = first_of(module(*args, **kwargs))
        total = torch.zeros_like(expected)
        for rank in range(size):
            for name, parameter in list(module.named_parameters()):
                part = whole[name]
                if (placement := unit.cuts.get(roles[name])) is not None:
                    part = own_part(part, placement, rank, size)
                parameter.data = part * float(rank == 0) if roles[name] in unit.once else part
            total += first_of(module(*args, **kwargs))
    except PROBE_ERRORS as error:
        return (
            f"its parts could not be computed one by one ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
        )
    off = ((total - expected).abs().max() / expected.abs().max()).item()
    return None if off <= EXACT else f"its {size} parts do not add up to the whole: off by {off:.1g}"


def calls_of(base: Any, modules: Sequence[nn.Module]) -> dict[nn.Module, Call]:
    """What each module is given when the model runs; nothing of those that it does not call."""
    calls: dict[nn.Module, Call] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, tree_map(_detached, (args, kwargs)))

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    _run(base, hooks)
    return calls


def _run(base: Any, hooks: Sequence[RemovableHandle]) -> None:
    """The model on a few tokens; hooks are gone afterwards."""
    device = next(base.parameters()).device
    try:
        with torch.no_grad():
            base(input_ids=torch.arange(TOKENS, device=device)[None] + 1, use_cache=False)
    except PROBE_ERRORS:  # a model that takes something else than tokens
        return
    finally:
        for hook in hooks:
            hook.remove()


def reads_elsewhere(base: Any, weight: torch.Tensor, owners: Sequence[nn.Module]) -> bool:
    """Whether the model computes with `weight` while none of its `owners` runs, who alone know that it is cut."""
    seen = _Seen(weight)
    hooks = [
        handle
        for owner in owners
        for handle in (
            owner.register_forward_pre_hook(lambda *_: seen.enter(1)),
            owner.register_forward_hook(lambda *_: seen.enter(-1), always_call=True),
        )
    ]
    with unnoticed(base), seen:
        _run(base, hooks)
    return seen.is_read


class _Seen(TorchFunctionMode):
    """Notes whether something is computed with a tensor while nobody is entered."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor, self._entered, self.is_read = tensor, 0, False

    def enter(self, by: int) -> None:
        """Or leave, by -1."""
        self._entered += by

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_attribute = getattr(func, "__name__", "") == "__get__"  # its dtype or device
        if not self._entered and not is_attribute and any(x is self._tensor for x in tree_leaves((args, kwargs))):
            self.is_read = True
        return func(*args, **(kwargs or {}))


@contextmanager
def unnoticed(base: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation; afterwards nothing of what happened is in its counts, its modes or random numbers."""
    training = [module for module in base.modules() if module.training]
    counts = {id(owner): owner for module in base.modules() if isinstance(owner := owner_of(module), Counts)}
    before = [
        (counter, counter.copy()) for one in counts.values() for counter in (one.fused, one.passed_on, one.materialised)
    ]
    devices = [] if next(base.parameters()).device.type == "cpu" else [torch.accelerator.current_device_index()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            base.eval()
            yield
    finally:
        for module in training:
            module.training = True
        for counter, was in before:
            counter.clear()
            counter.update(was)


def _detached(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


def _doubled(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def first_of(output: Any) -> torch.Tensor:
    """What a module gives, without what it gives beside."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]
