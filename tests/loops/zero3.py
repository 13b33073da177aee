"""What DeepSpeed's ZeRO-3 does to one process: a weight is empty except while its module runs, forward or backward.

It is gathered by hooks before the module's forward and backward, and freed after; whoever reads `module.weight` by himself finds
nothing. Its gradient is taken away as soon as it is there.
"""

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only


class _BeforeBackward(torch.autograd.Function):
    """The identity, which calls the partition when the gradient comes by."""

    @staticmethod
    def forward(ctx: Any, partition: "Partition", x: torch.Tensor) -> torch.Tensor:
        ctx.partition = partition
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.partition.gather()
        return None, grads[0]


class Partition:
    """Empties a linear's weight until the linear is called.

    Attributes:
        gradient: The sum of the weight's gradients, as they came.
        gathered: How often the weight was brought back.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.weight, self.whole, self.gathered = linear.weight, linear.weight.data, 0
        self.gradient = torch.zeros_like(self.whole)
        linear.register_forward_pre_hook(lambda *_: self.gather())
        linear.register_forward_hook(self._after_forward)
        linear.weight.register_post_accumulate_grad_hook(self._take)
        self._free()

    def gather(self) -> None:
        """Bring the weight back."""
        self.gathered += 1
        self.weight.data = self.whole

    def _free(self) -> None:
        self.weight.data = self.whole.new_empty(0)

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        self._free()
        return tree_map_only(torch.Tensor, lambda x: _BeforeBackward.apply(self, x), output)

    def _take(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        self.gradient += weight.grad
        weight.grad = None
        self._free()
