"""Optimizers of torch, with groups of parameters by pattern."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from automodel_accel.kernels.facts import this_machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters with settings of their own.

    Attributes:
        pattern: Of dotted names, such as "*.embed_tokens.*"; the first group that fits counts.
        lr: Their learning rate; None: the optimizer's.
        weight_decay: None: the optimizer's.
    """

    pattern: str
    lr: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """Which optimizer updates the parameters that train.

    Attributes:
        kind: "adamw", "adam", "sgd", "adafactor" (torch.optim), or "adamw8bit" (bitsandbytes: states of 8 bits).
        lr: Learning rate. LoRA wants about ten times that of full fine-tuning.
        weight_decay: Of matrices. Vectors (norms, biases) are not decayed unless a group says so.
        betas: Of the averages of gradient and square. "sgd" takes the first as momentum.
        eps: Added to the root of the square.
        groups: Parameters with settings of their own.

    Raises:
        ValueError: a rate or a decay below 0, or betas outside of 0 to 1.
    """

    kind: Literal["adamw", "adam", "sgd", "adafactor", "adamw8bit"] = "adamw"
    lr: float = 2e-5
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}; expected two numbers from 0 to below 1.")

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The optimizer of those parameters that train.

        Args:
            named_parameters: As `model.named_parameters()` gives them, after the model was applied and sharded.

        Raises:
            ValueError: none of them trains, a pattern fits none, or a package is missing.
        """
        groups = self._groups([(name, one) for name, one in named_parameters if one.requires_grad])
        if self.kind == "adamw8bit":
            return self._of_8_bits(groups)
        if self.kind == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.betas[0])
        if self.kind == "adafactor":
            return torch.optim.Adafactor(groups, lr=self.lr)
        made = torch.optim.AdamW if self.kind == "adamw" else torch.optim.Adam
        return made(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=_can_fuse(groups))

    def _groups(self, named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        if not named:
            raise ValueError("no parameter trains (requires_grad is False for all); unfreeze some, or add adapters.")
        found: dict[tuple[float, float], list[nn.Parameter]] = {}
        fits = dict.fromkeys((group.pattern for group in self.groups), 0)
        for name, parameter in named:
            group = next((group for group in self.groups if fnmatchcase(name, group.pattern)), None)
            lr, decay = self.lr, self.weight_decay if parameter.dim() > 1 else 0.0
            if group is not None:
                fits[group.pattern] += 1
                lr = self.lr if group.lr is None else group.lr
                decay = decay if group.weight_decay is None else group.weight_decay
            found.setdefault((lr, decay), []).append(parameter)
        if idle := [pattern for pattern, count in fits.items() if not count]:
            some = ", ".join(name for name, _ in named[:3])
            raise ValueError(f"optimizer.groups: {idle[0]!r} fits no parameter that trains, such as {some}.")
        return [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in found.items()]

    def _of_8_bits(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if not this_machine().has("bitsandbytes"):
            raise ValueError(
                "optimizer.kind adamw8bit is bitsandbytes'; install it: pip install 'automodel-accel[bnb]'."
            )
        import bitsandbytes

        made: Any = bitsandbytes.optim
        return made.AdamW8bit(groups, lr=self.lr, betas=self.betas, eps=self.eps)  # type: ignore[no-any-return]


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    """Torch's fused optimizers take floating-point parameters on the devices that have a kernel for them."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return devices <= {"cpu", "cuda", "xpu"} and len(devices) == 1
