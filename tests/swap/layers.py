"""Layers in every shape that a residual sum and a norm meet in, and in some that are meant to trip a lazy sum."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 16


class Branch(nn.Module):
    """Two linears; returns a tensor, or that and more."""

    def __init__(self, more: bool = False) -> None:
        super().__init__()
        self.inwards, self.outwards, self.more = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH), more
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> Any:
        assert type(x) is torch.Tensor
        y = self.outwards(F.silu(self.inwards(x if mask is None else x * mask)))
        return (y, y.detach().sum(), None) if self.more else y


class Layer(nn.Module):
    """Two norms, two branches; subclasses say how they are wired."""

    norm_class: Callable[..., nn.Module] = nn.RMSNorm

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = type(self).norm_class(WIDTH, eps=1e-6), type(self).norm_class(WIDTH, eps=1e-6)
        self.attention, self.mlp = Branch(more=True), Branch()
        self.dropout = nn.Dropout(0.0)
        self.scale = 0.37
        self.gain = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: torch.Tensor) -> Any:
        residual = x
        h, *_ = self.attention(self.norm1(x))
        h = residual + h
        residual = h
        return residual + self.mlp(self.norm2(h))


class Centred(Layer):
    """With LayerNorms."""

    norm_class = nn.LayerNorm


class Reversed(Layer):
    """branch + residual, by function."""

    def forward(self, x: torch.Tensor) -> Any:
        h = torch.add(self.attention(self.norm1(x))[0], x)
        return torch.add(self.mlp(self.norm2(h)), h)


class Scaled(Layer):
    """Branches times a number."""

    def forward(self, x: torch.Tensor) -> Any:
        h = x + self.attention(self.norm1(x))[0] * self.scale
        return h + 2 * self.mlp(self.norm2(h))


class Sandwich(Layer):
    """Norms after the branches too: a norm's output is the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.after1, self.after2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        h = x + self.after1(self.attention(self.norm1(x))[0])
        return h + self.after2(self.mlp(self.norm2(h)))


class PostNorm(Layer):
    """The norm of each sum goes on."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.norm1(x + self.attention(x)[0])
        return self.norm2(self.mlp(h) + h)


class Parallel(Layer):
    """Both branches at once, then a norm."""

    def forward(self, x: torch.Tensor) -> Any:
        normed = self.norm1(x)
        return self.norm2(self.attention(normed)[0] + self.mlp(normed) + x)


class Dropped(Layer):
    """Dropout that is off between branch and sum, as a module and as a function."""

    def forward(self, x: torch.Tensor) -> Any:
        h = x + self.dropout(self.attention(self.norm1(x))[0])
        h = self.norm2(h) + h
        return h + F.dropout(self.mlp(h), 0.3, training=False)


class ActiveDropout(Layer):
    """Dropout that is on."""

    def forward(self, x: torch.Tensor) -> Any:
        h = x + F.dropout(self.attention(self.norm1(x))[0], 0.4, self.training)
        return h + self.mlp(self.norm2(h))


class Outputs(Layer):
    """Returns the sum in a tuple, a list and a dict."""

    def forward(self, x: torch.Tensor) -> Any:
        h = x + self.attention(self.norm1(x))[0]
        return h, {"h": h, "both": [h, (self.norm2(h), None)]}, 3


class IntoResidual(Layer):
    """Adds into the residual's memory."""

    def forward(self, x: torch.Tensor) -> Any:
        h = x * 1
        h += self.attention(self.norm1(x))[0]
        return h + self.mlp(self.norm2(h))


class IntoBranch(Layer):
    """Adds into the memory of the branch's output, which somebody kept."""

    def forward(self, x: torch.Tensor) -> Any:
        branch = self.attention(self.norm1(x))[0]
        kept = branch
        branch += x
        branch.mul_(0.5)
        return kept + self.mlp(self.norm2(branch))


class IntoSum(Layer):
    """Writes into the sum, before the norm and through the residual's name."""

    def forward(self, x: torch.Tensor) -> Any:
        h = x + self.attention(self.norm1(x))[0]
        residual = h
        h *= 0.5
        h[..., 0] = 1.0
        return residual + self.mlp(self.norm2(h))


class Twice(Layer):
    """One branch output added twice, and to itself."""

    def forward(self, x: torch.Tensor) -> Any:
        branch = self.attention(self.norm1(x))[0]
        return self.norm2(x + branch) + self.norm2(branch + branch) + (x + branch)


class Looked(Layer):
    """Looks at the sum before the norm does."""

    def forward(self, x: torch.Tensor) -> Any:
        h = x + self.attention(self.norm1(x))[0]
        size = h.abs().mean()
        return h / (1 + size) + self.mlp(self.norm2(h))


class Routed(Layer):
    """The norm runs without gradients first, as for a router."""

    def forward(self, x: torch.Tensor) -> Any:
        h = x + self.attention(self.norm1(x))[0]
        with torch.no_grad():
            gate = self.norm2(h).sigmoid()
        return h + gate * self.mlp(self.norm2(h))


class Unsummed(Layer):
    """The sum is made where no gradient is wanted."""

    def forward(self, x: torch.Tensor) -> Any:
        branch = self.attention(self.norm1(x))[0]
        with torch.no_grad():
            h = x + branch
        return self.norm2(h) + branch


class Checkpointed(Layer):
    """Checkpoints its second half itself, with a lazy sum for an argument."""

    def forward(self, x: torch.Tensor) -> Any:
        h = x + self.attention(self.norm1(x))[0]
        return checkpoint(lambda h: h + self.mlp(self.norm2(h)), h, use_reentrant=False)


class LearnedScale(Layer):
    """Branches times a parameter and a quotient, broadcast sums, a slice."""

    def forward(self, x: torch.Tensor) -> Any:
        h = x + self.attention(self.norm1(x))[0] * self.gain
        h = h + self.mlp(self.norm2(h)) / 3 + self.norm2(h).mean(1, keepdim=True)
        return h + self.mlp(h)[:, :1] - 0.5


class Broadcast(Layer):
    """Adds rows of another shape to a branch."""

    def forward(self, x: torch.Tensor) -> Any:
        h = x[:, :1] + self.attention(self.norm1(x))[0]
        return self.norm2(self.mlp(self.norm2(h)) + x.mean())


# layer -> sums that are computed together with their norm, in one step
FUSED: dict[type[Layer], int] = {
    Layer: 1,
    Centred: 1,
    Reversed: 1,
    Scaled: 1,
    Sandwich: 1,
    PostNorm: 2,
    Parallel: 1,
    Dropped: 1,
    ActiveDropout: 1,
    Outputs: 1,
    IntoResidual: 0,
    IntoBranch: 0,
    IntoSum: 0,
    Twice: 2,
    Looked: 0,
    Routed: 0,
    Unsummed: 0,
    Checkpointed: 0,
    LearnedScale: 1,
    Broadcast: 0,
}
