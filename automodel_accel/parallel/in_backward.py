"""The optimizer inside of backward: each parameter is stepped as soon as its gradient is whole, and the gradient is freed.

For full fine-tuning that otherwise does not fit: the gradients of a model are never all there, one layer's are at a time. The
optimizer stays the one that was built: while a parameter is stepped it sees a group of just that one, with the settings of its
group, so learning-rate schedules, `state_dict()` and checkpoints are as without. Under FSDP2 gradients are whole after their
reduce-scatter, when torch calls the same hooks.

    optimizer = torch.optim.AdamW(model.parameters())
    step_in_backward(optimizer, model)
    loss.backward()                    # steps
    optimizer.step()                   # finds no gradient; ends the step
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class InBackward:
    """What `step_in_backward` set up.

    Attributes:
        optimizer: The optimizer, which steps in backward until `remove`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_each: float | None) -> None:
        self.optimizer = optimizer
        self._clip_each = clip_each
        self._stepped: set[torch.Tensor] = set()
        self._inside = False
        self._handles: list[Any] = [optimizer.register_step_post_hook(self._ended)]
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if parameter.requires_grad:
                    hook = self._hook(number)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        """Step by `optimizer.step()` again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, number: int) -> Callable[[torch.Tensor], None]:
        def step(parameter: torch.Tensor) -> None:
            if parameter in self._stepped:
                raise ValueError(
                    "step_in_backward: a second backward before optimizer.step(); gradients cannot be accumulated, as each is "
                    "used and freed in its backward. Take larger batches, or an ordinary step."
                )
            self._stepped.add(parameter)
            if self._clip_each is not None:
                _clip(parameter, self._clip_each)
            groups = self.optimizer.param_groups
            self.optimizer.param_groups, self._inside = [{**groups[number], "params": [parameter]}], True
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups, self._inside = groups, False
            parameter.grad = None

        return step

    def _ended(self, *args: Any) -> None:
        if not self._inside:
            self._stepped.clear()


def step_in_backward(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    clip_each: float | None = None,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
) -> InBackward:
    """Have `optimizer` step each parameter in backward. A loop stays as it is, with one backward a step.

    Args:
        optimizer: Any of `torch.optim` whose step takes no closure, over parameters of `model` as they are trained: under FSDP2,
            built after `fully_shard`.
        model: Wrapped as it is trained.
        clip_each: Largest norm of the gradient of each parameter by itself; None: as they are.
        accumulate: Micro-batches a step; only 1 is possible.
        max_grad_norm: Largest norm of all gradients; only None is possible.

    Returns:
        Its `remove()` undoes it.

    Raises:
        ValueError: what needs all gradients at once: accumulation, clipping by the norm of all, DistributedDataParallel, an
            optimizer that takes a closure.
    """
    if accumulate != 1:
        raise ValueError(
            f"step_in_backward: accumulate={accumulate}, but each gradient is used and freed in its backward; expected 1. Take "
            "larger batches, or an ordinary step."
        )
    if max_grad_norm is not None:
        raise ValueError(
            f"step_in_backward: max_grad_norm={max_grad_norm} needs the norm of all gradients, which are never all there; "
            "clip_each= clips each parameter's by itself."
        )
    wrappers = {type(module).__name__ for module in model.modules() if _keeps_gradients(module)}
    if wrappers:
        raise ValueError(
            f"step_in_backward: {', '.join(sorted(wrappers))} keeps all gradients in buckets, and averages them after they were "
            "accumulated: nothing would be saved. Shard the model (FSDP2), or take an ordinary step."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"step_in_backward: {type(optimizer).__name__} calls a closure in its step; expected one without."
        )
    return InBackward(optimizer, clip_each)


def _keeps_gradients(module: nn.Module) -> bool:
    """Whether it is a wrapper with buckets of its own: torch's for copies of a model, or megatron-fsdp."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return True
    syncs = hasattr(type(module), "set_requires_gradient_sync") or hasattr(type(module), "set_model_auto_sync")
    return syncs and not isinstance(module, FSDPModule)


def _clip(parameter: torch.Tensor, largest: float) -> None:
    assert parameter.grad is not None
    norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
    # the norm of a sharded gradient is that of all its parts, and a number on each rank
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
    local.mul_((largest / (norm + 1e-6)).clamp(max=1.0).to(local.dtype))
