"""Mistakes of others, to show that a test of ours can fail: Liger-Kernel itself where a CPU runs it, else a small model of the mistake."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama import modeling_llama

from tests.budgets.liger import runnable

HEAD_ALONE = {"rope": False, "rms_norm": False, "swiglu": False, "cross_entropy": False}
FILTERED_BELOW = 2.0**-12  # cut-cross-entropy's filter: probabilities that bfloat16 would round away


def liger_head(model: Any) -> Any:
    """The llama with Liger's fused loss and nothing else of it; its kernel runs in Triton's interpreter."""
    liger = pytest.importorskip("liger_kernel.transformers")
    liger.apply_liger_kernel_to_llama(fused_linear_cross_entropy=True, model=model, **HEAD_ALONE)
    return model


def liger_loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Liger's fused loss by itself."""
    operation = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    loss: Any = operation.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target)
    return loss[0] if isinstance(loss, tuple) else loss


def liger_rms_norm(x: torch.Tensor, weight: torch.Tensor, grad_output: torch.Tensor) -> None:
    """Forward and backward of Liger's RMS norm, in place as it is by default."""
    operation: Any = pytest.importorskip("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    with runnable():
        operation.apply(x, weight, 1e-6, 0.0, "llama", True).backward(grad_output)


@contextmanager
def ligers_globals(model: Any) -> Iterator[None]:
    """Inside, the process is as Liger leaves it after it was asked to change this one model; its defaults, its older loss."""
    liger = pytest.importorskip("liger_kernel.transformers")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"):
            patch.setattr(modeling_llama, name, getattr(modeling_llama, name))
        patch.setattr(nn.functional, "cross_entropy", nn.functional.cross_entropy)
        liger.apply_liger_kernel_to_llama(cross_entropy=True, fused_linear_cross_entropy=False, model=model)
        yield


class WeightlessNorm(torch.autograd.Function):
    """An RMS norm whose backward forgets its weight, as Unsloth's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.rms_norm(x, weight.shape, weight, 1e-6)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(nn.functional.rms_norm(x, weight.shape, weight, 1e-6), x, grads[0])[0], None


def filtered(probabilities: torch.Tensor) -> torch.Tensor:
    """What cut-cross-entropy's gradient filter leaves of a row of the softmax."""
    return probabilities.where(probabilities >= FILTERED_BELOW, 0.0)


class Gemms(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, counts matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        self.count += "mm" in function.__name__
        return function(*args, **(kwargs or {}))
